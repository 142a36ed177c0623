"""Steps per second of two hosts whose link has a delay: dnifx beside what waits for gradients.

    sudo python -m benchmarks.links
    sudo python -m benchmarks.links --seconds 20 --json links.json

The contestants train an MLP of 8 layers of 1,024 units on batches of 256, by SGD, with one thread in each process. Solo is one
process. DistributedDataParallel (ddp) gives each process half of every batch. GPipe and 1F1B (torch.distributed.pipelining) have
two stages of 4 layers, and the best of 2, 4 and 8 micro-batches. dnifx has a linear estimator that sees the label and is fitted to
late targets. That costs about as much as a layer, so its stages have 3 layers and 5.

The hosts are network namespaces of this machine (benchmarks/hosts.py). Without root or a tun device, nothing is measured.
A rate is that of the fastest stretch, which other work on the machine disturbs least; the median stands beside it.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dnifx
from benchmarks import hosts
from benchmarks.hosts import Wire
from benchmarks.timing import as_json

LAYERS, WIDTH, BATCH, CLASSES = 8, 1024, 256, 10
FIRST = 3
"""Layers before the cut of dnifx."""
WIRES = (Wire(), Wire(0.02), Wire(0.05), Wire(0.2), Wire(0.0, 100))
MICRO_BATCHES = (2, 4, 8)
STRETCHES = 4

Step = Callable[[], object]
Figures = dict[str, float]


def mlp() -> nn.Sequential:
    """Return the network."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH if index < LAYERS - 1 else CLASSES), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch() -> tuple[Tensor, Tensor]:
    """Return the inputs and classes of all steps."""
    made = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, WIDTH, generator=made), torch.randint(CLASSES, (BATCH,), generator=made)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of every contestant."""
    return torch.optim.SGD(parameters, lr=0.01)


def solo() -> Step:
    """Return a step of one process."""
    model, (x, y) = mlp(), batch()
    optimizer = sgd(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ddp() -> Step:
    """Return a step of two processes that average their gradients."""
    model, (x, y) = DistributedDataParallel(mlp()), batch()
    optimizer, own = sgd(model.parameters()), slice(dist.get_rank(), None, dist.get_world_size())
    x, y = x[own].contiguous(), y[own].contiguous()

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def pipeline(kind: Any, micro_batches: int) -> Step:
    """Return a step of a pipeline of two stages."""
    (x, y), rank = batch(), dist.get_rank()
    own = mlp()[:LAYERS] if rank == 0 else mlp()[LAYERS:]
    stage = PipelineStage(own, rank, 2, torch.device("cpu"))
    schedule, optimizer = kind(stage, n_microbatches=micro_batches, loss_fn=cross_entropy), sgd(own.parameters())

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])
        optimizer.step()

    return step


def decoupled(lag: int) -> Step:
    """Return a step of two partitions that do not wait for gradients."""
    x, y = batch()
    net = dnifx.decouple(
        mlp(), [str(2 * FIRST - 1)], args=(x,), context="label", num_classes=CLASSES, loss=cross_entropy
    )
    trainer = net.trainer(sgd, places="ranks", lag=lag)
    return lambda: trainer.step(x, target=y)


def contestants(lag: int) -> Mapping[str, Callable[[], Step]]:
    """Return what makes the step of each contestant of two processes."""
    found: dict[str, Callable[[], Step]] = {"dnifx": lambda: decoupled(lag), "ddp": ddp}
    for count in MICRO_BATCHES:
        found[f"gpipe {count}"] = lambda count=count: pipeline(ScheduleGPipe, count)  # type: ignore[misc]
        found[f"1f1b {count}"] = lambda count=count: pipeline(Schedule1F1B, count)  # type: ignore[misc]
    return found


def measure(step: Step, seconds: float, before: int, alone: bool = False) -> Figures:
    """Time a contestant on this host, in several stretches of equally many steps on all hosts.

    Args:
        step: One step.
        seconds: How long a stretch takes, about.
        before: Steps that come first.
        alone: Whether other hosts do nothing.
    """
    for _ in range(before):
        step()
    started = time.perf_counter()
    for _ in range(2):
        step()
    count = [max(2, min(60, round(2 * seconds / (time.perf_counter() - started))))]
    if not alone:
        dist.broadcast_object_list(count, dist.get_world_size() - 1)
    rates, working = [], time.process_time()
    for _ in range(STRETCHES):
        started = time.perf_counter()
        for _ in range(count[0]):
            step()
        rates.append(count[0] / (time.perf_counter() - started))
    cpu = (time.process_time() - working) / (count[0] * STRETCHES)
    return {"best": max(rates), "median": statistics.median(rates), "cpu_seconds": cpu}


def host(seconds: float, lag: int, out: Path) -> None:
    """Measure all contestants as one host; the last host writes down what it found, and each the time that it worked."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    if rank == 0:
        found["solo"] = measure(solo(), seconds, 2, alone=True)
    for name, make in contestants(lag).items():
        dist.barrier()
        found[name] = measure(make(), seconds, 2 * lag if name == "dnifx" else 2)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if rank == 0:
        whole = {**found, **gathered[-1]}
        for name, each in whole.items():
            each["cpu_seconds_of_hosts"] = [other[name]["cpu_seconds"] for other in gathered if name in other]
        out.write_text(json.dumps(whole))
    dist.barrier()


def over(wire: Wire, seconds: float, lag: int) -> dict[str, Figures]:
    """Measure all contestants over a link."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = (
            sys.executable,
            "-m",
            "benchmarks.links",
            "--host",
            str(out),
            "--seconds",
            str(seconds),
            "--lag",
            str(lag),
        )
        hosts.run(words, 2, wire, {"OMP_NUM_THREADS": "1"}, patience=1800)
        found: dict[str, Figures] = json.loads(out.read_text())
    return found


def chosen(found: Mapping[str, Figures], name: str) -> tuple[str, Figures]:
    """Return a contestant's figures; those with its best number of micro-batches where it has some."""
    return max(
        ((each, figures) for each, figures in found.items() if each.split()[0] == name), key=lambda it: it[1]["best"]
    )


def table(figures: Mapping[str, Mapping[str, Figures]]) -> Table:
    """Return the rates as a table, the medians in parentheses."""
    names = ("solo", "ddp", "gpipe", "1f1b", "dnifx")
    shown = Table("link", *names, title="steps per second: fastest stretch (median)", title_justify="left")
    for wire, found in figures.items():
        cells = []
        for each in names:
            name, best = chosen(found, each)
            cells.append(f"{best['best']:.2f} ({best['median']:.2f}){' of ' + name.split()[1] if ' ' in name else ''}")
        shown.add_row(wire, *cells)
    return shown


def main() -> None:
    """Measure over each link, print a table, and write the figures to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a stretch, of which there are 4 (%(default)s)")
    parser.add_argument("--lag", type=int, default=16, help="steps that a target of dnifx may be late (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--wire", type=int, nargs="*", help=f"which links, by number: {', '.join(map(str, WIRES))}")
    parser.add_argument("--host", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host:
        host(options.seconds, options.lag, options.host)
        return
    reason = hosts.missing()
    if reason:
        Console().print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are removed
    wires = [WIRES[each] for each in options.wire] if options.wire else list(WIRES)
    figures: dict[str, dict[str, Any]] = {}
    for wire in wires:
        figures[str(wire)] = over(wire, options.seconds, options.lag)
    Console().print(table(figures))
    if options.json is not None:
        load = f"{os.getloadavg()[2]:.1f} over 15 minutes, on {os.cpu_count()} cores"
        torch.set_num_threads(1)
        options.json.write_text(
            as_json("links", torch.device("cpu"), {"lag": options.lag, "load of the machine": load, "rates": figures})
        )


if __name__ == "__main__":
    main()
