"""Small models, and the programs that passes make of them, for the tests of single passes."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.ir import Program
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.cuts.partition import FormPartitions
from dnifx.passes.cuts.resolve import ResolveCuts
from dnifx.passes.emit.fused import EmitFused
from dnifx.passes.emit.split import SplitPartitions
from dnifx.passes.graph import captured
from dnifx.passes.insert.interfaces import InsertInterfaces
from dnifx.passes.legalize.legalize import Legalize
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import Pass, run_passes
from dnifx.passes.schedule import ScheduleActions
from dnifx.runtime.net.attach import attach
from dnifx.runtime.net.input_kinds import hold_constants

SYMBOLIC = CaptureGraph(methods=("symbolic",), verify=False)


def every_pass(cuts: Any, **options: Any) -> tuple[Pass, ...]:
    """Return all passes in order; the options are those of insert. Capture is symbolic: its names are those of torch.fx."""
    before = SYMBOLIC, MeasureNodes(), ResolveCuts(cuts), FormPartitions(), Legalize(), InsertInterfaces(**options)
    return *before, SplitPartitions(), ScheduleActions(), EmitFused()


def compiled(model: nn.Module, cuts: Any, *args: Any, until: str = "emit", **options: Any) -> Program:
    """Run a model through the passes up to the named one; ``kwargs`` are the model's, the rest are options of insert."""
    kwargs = options.pop("kwargs", {})
    passes = every_pass(cuts, **options)
    names = [step.name for step in passes]
    return run_passes(Program(model, args, kwargs), passes[: names.index(until) + 1])


def runnable(program: Program) -> fx.GraphModule:
    """Return the captured graph over the model's own modules, parameters and buffers."""
    holder = nn.Module()
    for registry in ("_modules", "_parameters", "_buffers"):
        holder.__dict__[registry].update(program.model.__dict__[registry])
    hold_constants(holder, program.constants)
    return attach(captured(program), holder, "Captured")


def members(partition_of: Mapping[str, int]) -> dict[int, set[str]]:
    """Return the nodes of each partition."""
    found: dict[int, set[str]] = {}
    for name, partition in partition_of.items():
        found.setdefault(partition, set()).add(name)
    return found


def mlp(*sizes: int, batch_norm: bool = False) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers.append(nn.Linear(inputs, outputs))
        layers += [nn.BatchNorm1d(outputs)] if batch_norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """A layer and what follows it, opened by tracing: ``relu(linear(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Residual(nn.Module):
    """``head(blocks(stem(x)) + stem(x))``: a value that goes round the blocks."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        h = stem
        for block in self.blocks:
            h = block(h)
        result: Tensor = self.head(h + stem)
        return result


class Tied(nn.Module):
    """Two layers with one weight: a tied parameter that both sides of a cut use."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result
