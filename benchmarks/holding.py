"""The memory of each process over ranks, for a model whose weights take most of it.

    python -m benchmarks.holding
    python -m benchmarks.holding --ranks 2 4 --layers 12 --width 2048 --json holding.json

torchrun starts the processes. Each trains a few steps with Adam: with all weights in every process ("all weights"), with the weights of
its own partitions ("own weights", what a trainer does), and with a model that was built on the meta device, so that no process ever
holds all ("own weights, meta"). MiB are what the process holds in memory, beyond what it held before the model was made (the code): after
the last step, and the most at a time. The largest of all processes counts. It needs Linux.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dnifx
from benchmarks.timing import as_json
from dnifx.runtime.training.holding import Holding

WAYS = {"all": "all weights", "own": "own weights", "meta": "own weights, meta"}
STEPS, CLASSES, BATCH = 4, 10, 8
MIB = 2**20

Figures = dict[str, float]


def model_of(layers: int, width: int) -> nn.Sequential:
    """Return a chain of equal layers."""
    body = (each for _ in range(layers) for each in (nn.Linear(width, width), nn.ReLU()))
    return nn.Sequential(*body, nn.Linear(width, CLASSES))


def resident() -> float:
    """Return the MiB that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def made(way: str, layers: int, width: int, count: int) -> dnifx.DecoupledModule:
    """Return the net, cut into as many parts as there are processes."""
    with torch.device("meta") if way == "meta" else nullcontext():
        torch.manual_seed(0)
        model, x = model_of(layers, width), torch.randn(BATCH, width)
    cuts = [str(2 * (layers * part // count) - 1) for part in range(1, count)]
    loss = nn.functional.cross_entropy
    return dnifx.decouple(model, cuts, args=(x,), context="label", num_classes=CLASSES, loss=loss)


def train(way: str, layers: int, width: int) -> Figures:
    """Train as one of the processes, and return what it holds."""
    torch.set_num_threads(1)
    rank, count = dnifx.join_ranks()
    made(way, 4, 4, count)  # loads all code
    before = resident()
    if way == "all":
        Holding.let_go = lambda self: None  # type: ignore[method-assign]
    net = made(way, layers, width, count)
    trainer = net.trainer(partial(torch.optim.Adam, lr=1e-4), places="ranks", lag=2)
    if way == "meta":
        trainer.initialize()
    drawn = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, y = torch.randn(BATCH, width, generator=drawn), torch.randint(CLASSES, (BATCH,), generator=drawn)
        trainer.step(x, target=y)
    found = {"rank": rank, "resident": resident() - before}
    trainer.close()
    return {**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB - before}


def measured(way: str, ranks: int, layers: int, width: int) -> Figures:
    """Let torchrun start the processes; return the figures of that which holds most."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words += ["-m", "benchmarks.holding", "--way", way, "--folder", folder]
        words += ["--layers", str(layers), "--width", str(width)]
        subprocess.run(words, check=True, capture_output=True)
        found = [json.loads(each.read_text(encoding="utf-8")) for each in Path(folder).iterdir()]
    return {name: max(each[name] for each in found) for name in ("resident", "peak")}


def table(found: dict[str, Figures], weights: float) -> Table:
    """Show the figures."""
    shown = Table("ranks, weights in each", "MiB after a step", "MiB at most", title=f"{weights:.0f} MiB of weights")
    for name, figures in found.items():
        shown.add_row(name, f"{figures['resident']:.0f}", f"{figures['peak']:.0f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options; measure, or be one of the processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--way", choices=[*WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.way:
        figures = train(options.way, options.layers, options.width)
        (options.folder / f"{figures['rank']:.0f}.json").write_text(json.dumps(figures), encoding="utf-8")
        return
    found = {
        f"{ranks}, {name}": measured(way, ranks, options.layers, options.width)
        for ranks in options.ranks
        for way, name in WAYS.items()
    }
    weights = options.layers * (options.width + 1) * options.width * 4 / MIB
    Console().print(table(found, weights))
    if options.json:
        settings = {
            "layers": options.layers,
            "width": options.width,
            "batch": BATCH,
            "steps": STEPS,
            "weights": weights,
        }
        options.json.write_text(as_json("holding", torch.device("cpu"), {**settings, **found}), encoding="utf-8")


if __name__ == "__main__":
    main()
