"""Processes that are started once, and run a job together again and again: each job in a gloo group of its own."""

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

Job = Callable[..., Any]
PATIENCE = 120.0
"""Seconds after which a rank that does not answer counts as stuck."""


@dataclass(frozen=True)
class Failed:
    """What a rank answers that raised an error, or died."""

    kind: str
    text: str


class Pool:
    """So many processes of one thread each."""

    def __init__(self, size: int) -> None:
        context, self.jobs = multiprocessing.get_context("spawn"), 0
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self.ends: list[Connection] = []
        self.processes = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, self.store.port), daemon=True)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, job: Job, *args: Any, count: int) -> list[Any]:
        """Let the first ``count`` processes run a job; return what each returned, or how it failed."""
        self.jobs += 1
        for rank, end in enumerate(self.ends[:count]):
            end.send((job, args, rank, count, self.jobs))
        return [answer(end) for end in self.ends[:count]]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def answer(end: Connection) -> Any:
    """Wait for what a process returns."""
    try:
        return end.recv() if end.poll(PATIENCE) else Failed("stuck", f"no answer in {PATIENCE} s")
    except EOFError:
        return Failed("died", "the process is gone")


def serve(end: Connection, port: int) -> None:
    """Run one job after the other; the test's own process keeps the store, as torchrun's agent does."""
    torch.set_num_threads(1)
    kept = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    while True:
        job, args, rank, count, number = end.recv()
        store = distributed_c10d.PrefixStore(f"job {number}", kept)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        try:
            found = job(*args)
        except BaseException as error:  # noqa: BLE001 - the answer says which
            found = Failed(type(error).__name__, f"{error}\n{''.join(traceback.format_exception(error)[-3:])}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        end.send(found)


@contextmanager
def started(size: int) -> Iterator[Pool]:
    """A pool that is ended at the end."""
    pool = Pool(size)
    try:
        yield pool
    finally:
        pool.close()


def torchrun(processes: int, restarts: int, *command: str) -> None:
    """Run a command as torchrun does on one machine.

    Raises:
        CalledProcessError: It fails.
    """
    options = f"--standalone --nproc-per-node={processes} --max-restarts={restarts}".split()
    words = [sys.executable, "-m", "torch.distributed.run", *options, *command]
    root = str(Path(__file__).parents[2])
    subprocess.run(words, check=True, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
