"""The memory and the time of a training step by backpropagation, with checkpoints, and in partitions.

    python -m benchmarks.partitions
    python -m benchmarks.partitions --blocks 8 --parts 2 4 --json partitions.json

It trains a transformer and a residual network of 32 blocks, cut into 2, 4, 8, 16 and 32 parts. ``torch.utils.checkpoint`` keeps
what enters each part, and computes the part again in the backward pass. dnifx (the scheduled target, with linear estimators)
updates a part before the next one runs. Bytes are the most that torch holds at once during a step, beyond weights and inputs:
activations, and gradients of parameters. Seconds are those of the processor on one thread, which other work hardly disturbs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import dnifx
from benchmarks.memory import Residual, peak_bytes
from benchmarks.timing import as_json

BLOCKS, PARTS, CLASSES = 32, (2, 4, 8, 16, 32), 10
WIDTH, HEADS, TOKENS = 64, 4, 64

Figures = dict[str, float]


class Block(nn.Module):
    """A transformer block over [batch, length, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.taken, self.given = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the next values."""
        taken = self.taken(self.before(x)).unflatten(-1, (3, HEADS, -1)).movedim(2, 0).transpose(2, 3)
        seen = scaled_dot_product_attention(taken[0], taken[1], taken[2])
        x = x + self.given(seen.transpose(1, 2).flatten(2))
        made: Tensor = x + self.body(self.between(x))
        return made


def transformer(blocks: int, batch: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a transformer, values of tokens and a class for each token."""
    layers = nn.Sequential(*(Block() for _ in range(blocks)), nn.Linear(WIDTH, CLASSES))
    return layers, torch.randn(batch, TOKENS, WIDTH), torch.randn(batch, TOKENS, CLASSES)


def residual_network(blocks: int, batch: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a residual network, images and targets."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    layers = nn.Sequential(*(Residual(16) for _ in range(blocks)), head)
    return layers, torch.randn(batch, 16, 24, 24), torch.randn(batch, CLASSES)


MODELS = {"transformer": transformer, "residual network": residual_network}


def ends(blocks: int, parts: int) -> list[int]:
    """Return the last block of each part but the last one."""
    return [blocks * number // parts - 1 for number in range(1, parts)]


def sgd(parameters: object) -> torch.optim.Optimizer:
    """Return the optimizer of every contestant. Its rate is low, so that the fits of 32 untrained estimators stay finite."""
    return torch.optim.SGD(parameters, lr=1e-6)  # type: ignore[arg-type]


def whole(model: nn.Sequential, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Return a step of backpropagation."""
    return loop(model, lambda: model(x), y)


def checkpointed(model: nn.Sequential, x: Tensor, y: Tensor, cuts: Sequence[int]) -> Callable[[], object]:
    """Return a step of backpropagation that keeps only what enters each part."""
    edges = [0, *(cut + 1 for cut in cuts), len(model)]
    segments = [model[start:end] for start, end in pairwise(edges)]

    def forward() -> Tensor:
        value = x
        for segment in segments:
            value = checkpoint(segment, value, use_reentrant=False)
        return value

    return loop(model, forward, y)


def loop(model: nn.Module, forward: Callable[[], Tensor], y: Tensor) -> Callable[[], object]:
    """Return a step of an ordinary loop."""
    optimizer = sgd(model.parameters())

    def step() -> None:
        nn.functional.mse_loss(forward(), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoupled(model: nn.Sequential, x: Tensor, y: Tensor, cuts: Sequence[int]) -> Callable[[], object]:
    """Return a step in partitions."""
    net = dnifx.decouple(model, [str(cut) for cut in cuts], args=(x,), loss=nn.functional.mse_loss)
    trainer = net.trainer(sgd)
    return lambda: trainer.step(x, target=y)


def measure(step: Callable[[], object], rounds: int) -> Figures:
    """Return the peak bytes of a step, and the processor's seconds."""
    step()
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    return {"bytes": peak_bytes(step), "seconds": statistics.median(seconds)}


def figures(name: str, blocks: int, batch: int, parts: Sequence[int], rounds: int) -> dict[str, Figures]:
    """Measure one model in all ways."""

    def made() -> tuple[nn.Sequential, Tensor, Tensor]:
        torch.manual_seed(0)
        return MODELS[name](blocks, batch)

    found = {"backprop": measure(whole(*made()), rounds)}
    found["backprop"]["gradient bytes"] = 4 * sum(each.numel() for each in made()[0].parameters())
    for count in parts:
        cuts = ends(blocks, count)
        found[f"checkpoint {count}"] = measure(checkpointed(*made(), cuts), rounds)
        found[f"dnifx {count}"] = measure(decoupled(*made(), cuts), rounds)
    return found


def table(name: str, found: Mapping[str, Figures], parts: Sequence[int]) -> Table:
    """Return the figures of one model beside those of backpropagation."""
    base = found["backprop"]
    title = f"{name}: backprop {base['bytes'] / 1e6:.1f} MB, {base['seconds'] * 1000:.0f} ms"
    shown = Table("parts", "1/P + 10%", "checkpoint", "dnifx", title=title, title_justify="left")
    for count in parts:
        cells = [
            f"{found[each]['bytes'] / base['bytes']:.2f} of the bytes, {found[each]['seconds'] / base['seconds']:.2f} of the time"
            for each in (f"checkpoint {count}", f"dnifx {count}")
        ]
        shown.add_row(str(count), f"{1 / count + 0.1:.2f}", *cells)
    return shown


def main() -> None:
    """Measure both models, print tables, and write the figures to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples in a batch (%(default)s)")
    parser.add_argument("--parts", type=int, nargs="*", default=PARTS, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console, results = Console(), {}
    for name in MODELS:
        results[name] = figures(name, asked.blocks, asked.batch, asked.parts, asked.rounds)
        console.print(table(name, results[name], asked.parts))
    if asked.json is not None:
        asked.json.write_text(as_json("partitions", torch.device("cpu"), results))


if __name__ == "__main__":
    main()
