"""Steps per second of hosts whose links have a delay: dnifx beside what waits for gradients, measured and predicted.

    sudo python -m benchmarks.links
    sudo python -m benchmarks.links --hosts 2 3 --seconds 20 --json links.json

The contestants train an MLP of 8 layers of 1,024 units on batches of 256, by SGD, with one thread in each process. Solo is one
process. DistributedDataParallel (ddp) gives each process a part of every batch. GPipe and 1F1B (torch.distributed.pipelining) have
stages of 4 layers, on three hosts of 3, 3 and 2, and the best of 2, 4 and 8 micro-batches. dnifx has linear estimators that see the
label and are fitted to late targets. Each costs about as much as a layer, so its stages have 3 layers and 5, or 2, 2 and 4.

The prediction is what ``dnifx doctor`` says: the first host measures the actions of a step before the others begin. The hosts, and what
carries their packets, share the cores of this machine. So it is told how many cores these are, and what a byte costs all of them.

The hosts are network namespaces of this machine (benchmarks/hosts.py). Without root or a tun device, nothing is measured.
The rate of a stretch is that of its slowest host: a host may catch up with what was under way. The rate shown is that of the fastest
stretch, which other work on the machine disturbs least; the median stands beside it.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
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
from dnifx.doctor import diagnose
from dnifx.schedules import Link

LAYERS, WIDTH, BATCH, CLASSES = 8, 1024, 256, 10
CUTS = {2: (3,), 3: (2, 4)}
"""By the number of hosts, the layers before each cut of dnifx: an estimator costs as much as a layer."""
STAGES = {2: (4,), 3: (3, 6)}
"""The same for the pipelines."""
MESSAGES = 48
"""Messages by which the first host finds out what a byte costs."""
WIRES = (Wire(), Wire(0.02), Wire(0.05), Wire(0.2), Wire(0.0, 100))
MICRO_BATCHES = (2, 4, 8)
STRETCHES = 4
WAYS = ("dnifx", "ddp", "gpipe", "1f1b")

Step = Callable[[], object]
Figures = dict[str, Any]


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
    """Return a step of a pipeline."""
    (x, y), rank, count = batch(), dist.get_rank(), dist.get_world_size()
    edges = [0, *STAGES[count], LAYERS]
    own = mlp()[2 * edges[rank] : 2 * edges[rank + 1]]
    stage = PipelineStage(own, rank, count, torch.device("cpu"))
    schedule, optimizer = kind(stage, n_microbatches=micro_batches, loss_fn=cross_entropy), sgd(own.parameters())

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        elif rank == count - 1:
            schedule.step(target=y, losses=[])
        else:
            schedule.step()
        optimizer.step()

    return step


def net(ends: Sequence[int], **options: Any) -> dnifx.DecoupledModule:
    """Return the network, cut behind some of its layers."""
    return dnifx.decouple(
        mlp(), [str(2 * each - 1) for each in ends], args=(batch()[0],), loss=cross_entropy, **options
    )


def decoupled_net(hosts: int) -> dnifx.DecoupledModule:
    """Return the network as dnifx trains it on some hosts."""
    return net(CUTS[hosts], context="label", num_classes=CLASSES)


def decoupled(lag: int) -> Step:
    """Return a step of partitions that do not wait for gradients."""
    x, y = batch()
    trainer = decoupled_net(dist.get_world_size()).trainer(sgd, places="ranks", lag=lag)
    return lambda: trainer.step(x, target=y)


def byte_seconds(carrier: int) -> float:
    """Measure what a byte costs each of two hosts, and the process that carries the packets: together, and by half."""
    rank, size = dist.get_rank(), BATCH * WIDTH
    move: Any = dist.isend if rank == 0 else dist.irecv
    started, before = time.process_time(), processor_seconds(carrier)
    if rank < 2:
        for work in [move(torch.zeros(size), 1 - rank) for _ in range(MESSAGES)]:
            work.wait()
    spent: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(spent, time.process_time() - started)
    seconds: float = sum(spent[:2]) + processor_seconds(carrier) - before
    return seconds / (2 * MESSAGES * size * 4)


def processor_seconds(process: int) -> float:
    """Return the processor's time that a process has taken, from the kernel."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def predicted(wire: Wire, lag: int, count: int, handling: float) -> dict[str, float]:
    """Predict the rate of each contestant from what this process measures."""
    y, cores = batch()[1], os.cpu_count() or 1
    link = Link(wire.delay, wire.megabits * 1e6 / 8 or inf, handling)
    own = diagnose(decoupled_net(count), y, sgd, places=count, link=link, lag=lag, cores=cores)
    waiting = diagnose(net(STAGES[count], gradient="zero"), y, sgd, places=count, link=link, lag=0, cores=cores)
    found = {each.name: each.rate for each in (*own.contestants, *waiting.contestants[-3:-1])}
    return {{"backprop": "solo"}.get(name, name): rate for name, rate in found.items()}


def contestants(lag: int, ways: Sequence[str]) -> Mapping[str, Callable[[], Step]]:
    """Return what makes the step of each contestant of several processes, of those that are asked for."""
    found: dict[str, Callable[[], Step]] = {"dnifx": lambda: decoupled(lag), "ddp": ddp}
    for count in MICRO_BATCHES:
        found[f"gpipe {count}"] = lambda count=count: pipeline(ScheduleGPipe, count)  # type: ignore[misc]
        found[f"1f1b {count}"] = lambda count=count: pipeline(Schedule1F1B, count)  # type: ignore[misc]
        if count < dist.get_world_size():
            del found[f"1f1b {count}"]  # torch has it only with as many micro-batches as there are stages
    return {name: make for name, make in found.items() if name.split()[0] in ways}


def measure(step: Step, seconds: float, before: int, alone: bool = False) -> Figures:
    """Return the rates of a contestant on this host, in several stretches of equally many steps on all hosts, and its work in a step.

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
    return {"stretches": rates, "cpu_seconds": cpu}


def together(hosts: Sequence[Figures]) -> Figures:
    """Return the figures of a contestant from those of its hosts."""
    stretches = [min(each) for each in zip(*(host["stretches"] for host in hosts), strict=True)]
    cpu = [host["cpu_seconds"] for host in hosts]
    return {"best": max(stretches), "median": statistics.median(stretches), "cpu_seconds_of_hosts": cpu}


def host(seconds: float, lag: int, wire: Wire, ways: Sequence[str], carrier: int, out: Path) -> None:
    """Measure all contestants as one host; the first writes down what all found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found, count = dist.get_rank(), dict[str, Any](), dist.get_world_size()
    handling, prediction = byte_seconds(carrier), dict[str, float]()
    if rank == 0:
        found["solo"] = measure(solo(), seconds, 2, alone=True)
        prediction = predicted(wire, lag, count, handling)
    for name, make in contestants(lag, ways).items():
        dist.barrier()
        found[name] = measure(make(), seconds, 2 * lag if name == "dnifx" else 2)
    gathered: list[Any] = [None] * count
    dist.all_gather_object(gathered, found)
    if rank == 0:
        names = dict.fromkeys(name for host in gathered for name in host)
        whole = {name: together([host[name] for host in gathered if name in host]) for name in names}
        for name in {each.split()[0] for each in whole}:
            chosen(whole, name)[1]["predicted"] = prediction[name]
        whole["solo"]["nanoseconds_of_a_byte"] = handling * 1e9
        out.write_text(json.dumps(whole))
    dist.barrier()


def over(wire: Wire, seconds: float, lag: int, count: int, ways: Sequence[str]) -> dict[str, Figures]:
    """Measure all contestants over a link between so many hosts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        own = {"--host": out, "--seconds": seconds, "--lag": lag, "--carrier": os.getpid()}
        own |= {"--delay": wire.delay, "--megabits": wire.megabits}
        words = [sys.executable, "-m", "benchmarks.links", *(str(word) for pair in own.items() for word in pair)]
        words += ["--ways", *ways]
        hosts.run(words, count, wire, {"OMP_NUM_THREADS": "1"}, patience=1800)
        found: dict[str, Figures] = json.loads(out.read_text())
    return found


def chosen(found: Mapping[str, Figures], name: str) -> tuple[str, Figures]:
    """Return a contestant's figures; those with its best number of micro-batches where it has some."""
    return max(
        ((each, figures) for each, figures in found.items() if each.split()[0] == name), key=lambda it: it[1]["best"]
    )


def table(figures: Mapping[str, Mapping[str, Figures]]) -> Table:
    """Return the rates as a table: the fastest stretch, the median in parentheses, and the prediction."""
    names = ("solo", *WAYS[1:], WAYS[0])
    title = "steps per second: fastest stretch (median), predicted"
    shown = Table("hosts and link", *names, title=title, title_justify="left")
    for wire, found in figures.items():
        cells = []
        for each in names:
            if each not in {name.split()[0] for name in found}:
                cells.append("")
                continue
            name, best = chosen(found, each)
            which = f" of {name.split()[1]}" if " " in name else ""
            guess = f", {best['predicted']:.2f}" if "predicted" in best else ""
            cells.append(f"{best['best']:.2f} ({best['median']:.2f}){which}{guess}")
        shown.add_row(wire, *cells)
    return shown


def main() -> None:
    """Measure over each link, print a table, and write the figures to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a stretch, of which there are 4 (%(default)s)")
    parser.add_argument("--lag", type=int, default=16, help="steps that a target of dnifx may be late (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--wire", type=int, nargs="*", help=f"which links, by number: {', '.join(map(str, WIRES))}")
    parser.add_argument("--hosts", type=int, nargs="*", default=[2], choices=list(CUTS), help="how many hosts (2)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="beside one process (all)")
    parser.add_argument("--host", type=Path, help=argparse.SUPPRESS)
    for name, kind in (("carrier", int), ("delay", float), ("megabits", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host:
        wire = Wire(options.delay, options.megabits)
        host(options.seconds, options.lag, wire, options.ways, options.carrier, options.host)
        return
    reason = hosts.missing()
    if reason:
        Console().print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are removed
    wires = [WIRES[each] for each in options.wire] if options.wire else list(WIRES)
    figures: dict[str, dict[str, Any]] = {}
    for count in options.hosts:
        for wire in wires:
            figures[f"{count} hosts, {wire}"] = over(wire, options.seconds, options.lag, count, options.ways)
    Console().print(table(figures))
    if options.json is not None:
        load = f"{os.getloadavg()[2]:.1f} over 15 minutes, on {os.cpu_count()} cores"
        torch.set_num_threads(1)
        options.json.write_text(
            as_json("links", torch.device("cpu"), {"lag": options.lag, "load of the machine": load, "rates": figures})
        )


if __name__ == "__main__":
    main()
