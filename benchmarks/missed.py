"""What a suffix misses: an estimator of the difference between the true gradient and that of the suffix.

    python -m benchmarks.missed
    python -m benchmarks.missed --steps 400 --seeds 3 --json missed.json

A causal language model is cut in the middle. Its first half learns from the gradient of a suffix ("suffix"), or from that plus the answer
of an estimator that is fitted to what it misses: one that sees the value ("value"), one that sees the next character too ("label"), or
one that answers the same for every position ("mean"). Each is a linear map that begins at zero. The table gives, at the end,

- the cosine of the gradient of each value at the cut with the true one;
- R2, the share of what the suffix misses that the estimator knows, on a batch that it was not fitted to;
- the cosine of the gradient of the first half's parameters with the true one, on a batch and summed over 16 batches. In the sum,
  errors that change from batch to batch fade, and those that stay remain;
- how long that sum is, as a multiple of that of the true gradient.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

import dnifx
from benchmarks.timing import as_json
from dnifx.estimators import Suffix
from dnifx.zoo import LanguageModel
from dnifx.zoo.charlm import tiny_shakespeare
from dnifx.zoo.words import Windows, rows_of

LENGTH, BATCH, WIDTH, LOOKS = 32, 16, 64, 16
WAYS = {"suffix": "suffix", "value": "+ value", "label": "+ value, label", "mean": "+ mean"}
COLUMNS = {
    "perplexity": "perplexity",
    "values": "cosine, values",
    "r2": "R2",
    "batch": "cosine, parameters",
    "sum": "cosine, 16 batches",
    "length": "length, 16 batches",
}

Batch = tuple[Tensor, Tensor]


class Missed(nn.Module):
    """Predicts what the suffix misses at each position.

    Args:
        way: What it sees, one of ``WAYS``.
        symbols: Number of characters.
    """

    def __init__(self, way: str, symbols: int) -> None:
        super().__init__()
        self.way, self.symbols = way, symbols
        self.map = nn.Linear(WIDTH + symbols * (way == "label"), WIDTH)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, value: Tensor, target: Tensor) -> Tensor:
        """Return the prediction for values [batch, length, width] and the next characters [batch, length]."""
        if self.way == "mean":
            return self.map.bias.expand_as(value)
        if self.way == "label":
            value = torch.cat([value, one_hot(target, self.symbols).to(value.dtype)], 2)
        found: Tensor = self.map(value)
        return found


class Halves:
    """A language model that is cut in the middle, its suffix, and an estimator of what that misses.

    Args:
        way: How the first half learns, one of ``WAYS``.
        symbols: Number of characters.
        steps: Steps of the run.
        lr: Learning rate of Adam at first; it falls along a cosine.
    """

    def __init__(self, way: str, symbols: int, steps: int, lr: float) -> None:
        example = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        net = dnifx.decouple(
            LanguageModel(symbols, 4, WIDTH, 4, LENGTH),
            ["blocks.1"],
            args=(example,),
            gradient=Suffix(),
            loss=token_loss,
        )
        suffix: Any = net.program.interfaces[0].estimator
        self.way, self.model, (self.first, self.second), self.thin = way, net.original, net.submodules, suffix.thin
        self.missed = Missed(way, symbols)
        learners = [*self.model.parameters(), *self.thin.parameters()]
        groups = [{"params": learners, "lr": lr}, {"params": list(self.missed.parameters()), "lr": 1e-3}]
        self.optimizer = torch.optim.Adam(groups)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.own = [net.original.get_parameter(name) for name in net.partitions[0].parameters]

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the value at the cut, the suffix's gradient, the true one, and the prediction of the difference, per position.

        All gradients are those of the summed loss of a position, so that their size does not depend on the batch. What learns from
        the batch beside the first half has its gradients afterwards.
        """
        inputs, target = batch
        (value,) = self.first(inputs)
        leaves = [value.detach().requires_grad_() for _ in range(2)]
        losses = token_loss(self.thin(leaves[0])[0], target), token_loss(self.second(leaves[1])[0], target)
        torch.autograd.backward(losses)
        suffix, true = (leaf.grad * target.numel() for leaf in leaves)
        return value, suffix, true, self.missed(value.detach(), target)

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        self.optimizer.zero_grad()
        value, suffix, true, missed = self.gradients(batch)
        answer = suffix if self.way == "suffix" else suffix + missed.detach()
        torch.autograd.backward(value, answer / batch[1].numel())
        torch.autograd.backward((missed - (true - suffix)).square().mean())
        self.optimizer.step()
        self.scheduler.step()

    def look(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Compare what the first half learns from with the true gradient, over some batches."""
        sums = [torch.zeros(()), torch.zeros(())]
        cosines, found = list[float](), dict[str, float]()
        for number in range(LOOKS):
            value, suffix, true, missed = self.gradients(batch := next(batches))
            answer = suffix if self.way == "suffix" else suffix + missed.detach()
            flat = [self._to_parameters(value, gradient / batch[1].numel()) for gradient in (answer, true)]
            cosines.append(float(cosine_similarity(flat[0], flat[1], dim=0)))
            sums = [one + two for one, two in zip(sums, flat, strict=True)]
            if not number:
                rest = true - suffix
                found["values"] = float(cosine_similarity(answer, true, dim=2).mean())
                found["r2"] = float(1 - (rest - missed.detach()).square().sum() / rest.square().sum())
        length = float(sums[0].norm() / sums[1].norm())
        total = float(cosine_similarity(sums[0], sums[1], dim=0))
        return {**found, "batch": fmean(cosines), "sum": total, "length": length}

    def _to_parameters(self, value: Tensor, gradient: Tensor) -> Tensor:
        found = torch.autograd.grad(value, self.own, gradient, retain_graph=True, materialize_grads=True)
        return torch.cat([each.flatten() for each in found])


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss of the positions."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def train(way: str, seed: int, steps: int, lr: float) -> dict[str, float]:
    """Train from a seed and return the perplexity of the validation part, and how near the gradients are."""
    torch.manual_seed(seed)
    text = tiny_shakespeare()
    halves = Halves(way, len(text.characters), steps, lr)
    batches = Windows(text.train, BATCH, LENGTH, seed)
    for _ in range(steps):
        halves.step(batches.next())
    found = halves.look(batches.next() for _ in range(LOOKS))
    halves.model.eval()
    with torch.no_grad():
        losses = [
            float(token_loss(halves.model(*inputs), target))
            for *inputs, target in rows_of(text.validation, LENGTH, 250)
        ]
    return {"perplexity": math.exp(fmean(losses)), **found}


def main() -> None:
    """Print the table of all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="how the first half learns")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of Adam at first")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    runs = [(way, seed) for way in options.ways for seed in range(options.seeds)]
    figures = [
        {"way": way, "seed": seed, **train(way, seed, options.steps, options.lr)}
        for way, seed in track(runs, "training", console=console)
    ]
    table = Table(title=f"language model, cut in the middle, {options.steps} steps")
    for column in ("learns from", *COLUMNS.values()):
        table.add_column(column)
    for way in options.ways:
        own = [each for each in figures if each["way"] == way]
        cells = [[float(each[key]) for each in own] for key in COLUMNS]
        table.add_row(
            WAYS[way], *(f"{fmean(each):.3f}" + (f" ± {stdev(each):.3f}" if len(each) > 1 else "") for each in cells)
        )
    console.print(table)
    if options.json is not None:
        text = as_json("missed", torch.device("cpu"), {"steps": options.steps, "runs": figures})
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
