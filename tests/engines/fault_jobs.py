"""What each rank does in tests of faults: signals, ranks that are slow or silent, and runs that go on from a save."""

import os
import signal
import subprocess
import time
from typing import Any

import pytest
import torch.distributed as dist

from dnifx.errors import RankError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.engines import jobs

STEPS = 14


def made(places: Any, lag: int, schedule: str = "sequential") -> tuple[DecoupledModule, Trainer]:
    """A net and its trainer, over ranks or in one process."""
    net = jobs.chain()
    return net, net.trainer(jobs.adam, schedule, places=places, lag=lag, replicas=None if places else "apart")


def here() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def signalled(folder: str, step: int, culprit: int, lag: int, schedule: str, places: Any) -> tuple[int, object]:
    """Train until a signal comes to one rank in the middle of a step; return the steps done and the exit code."""
    _, trainer = made(places, lag, schedule)
    trainer.save_on_signal(folder)
    try:
        for number, (x, y) in enumerate(jobs.batches(STEPS * 10)):
            if number == step and here() == culprit:
                os.kill(os.getpid(), signal.SIGTERM)
            if here() == dist.get_world_size() - 1:
                time.sleep(0.05)  # the others get as far ahead as they may
            trainer.step(x, target=y)
    except SystemExit as error:
        return trainer.steps, error.code
    return trainer.steps, "no signal"


def resumed(folder: str, lag: int, schedule: str, places: Any) -> str:
    """Go on from a folder, for some steps; say what differs from a run in one process without a break."""
    net, trainer = made(places, lag, schedule)
    if not trainer.load(folder, missing_ok=True):
        return "nothing was saved"
    data = jobs.batches(trainer.steps + 5)
    jobs.train(trainer, data[trainer.steps :])
    trainer.collect()
    trainer.close()
    if places:
        with pytest.raises(RankError, match="the trainer was closed"):
            jobs.train(trainer, data[:1])
    one, alone = made(None, lag, schedule)
    jobs.train(alone, data)
    return f"weights: {found}" if (found := jobs.differences(net, one)) else ""


def slow(lag: int, culprit: int) -> str:
    """Train while a rank is slow for some steps; say what differs from a run in one process."""
    net, trainer = made("ranks", lag)
    data = jobs.batches(STEPS)
    for number, (x, y) in enumerate(data):
        if here() == culprit and 4 <= number < 8:
            time.sleep(0.1)
        trainer.step(x, target=y)
    trainer.collect()
    trainer.close()
    one, alone = made(None, lag)
    jobs.train(alone, data)
    return f"weights: {found}" if (found := jobs.differences(net, one)) else ""


def silent(culprit: int, timeout: float) -> None:
    """Train; in the sixth step a rank stands still, as a machine does that has lost its network."""
    net = jobs.chain()
    trainer = net.trainer(jobs.sgd, places="ranks", lag=2, timeout=timeout)
    for number, (x, y) in enumerate(jobs.batches(40)):
        if number == 5 and here() == culprit:
            subprocess.Popen(["sh", "-c", f"sleep {2 * timeout}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        trainer.step(x, target=y)


def gone(culprit: int) -> None:
    """A rank is killed while the others wait for all."""
    _, trainer = made("ranks", 2)
    for x, y in jobs.batches(3):
        trainer.step(x, target=y)
    if here() == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.collect()
