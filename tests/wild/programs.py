"""Random programs: modules whose forward is Python as people write it.

Where ``tests/random_models`` draws graphs that an oracle can follow, these have branches, loops, helper methods, dicts, None, integers,
tied weights, writes in place and views; they are held to plain autograd. One number gives one program, on any machine.
"""

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dnifx import Edge
from tests.real_models.model_checks import spread_loss

Cuts = int | str | list[str] | list[Edge] | Callable[[fx.Node], bool]
Call = tuple[tuple[Any, ...], dict[str, Any]]
BATCHES = (2, 3, 5)


@dataclass(frozen=True)
class Wild:
    """A drawn program; its ``repr`` is the source, ready to be pasted below the usual imports of torch.

    Attributes:
        number: What it was drawn from.
        source: The class ``Drawn``.
        cuts: Where it is cut.
        form: How inputs come: ``plain``, ``keyword`` or ``dict``.
        masked: Whether the optional mask is given.
        batch: Examples in the call that it is captured with.
        training: Whether it is captured in training.
        features: What it reaches.
        optional: Whether the keyword-only inputs are given, where it has any.
    """

    number: str
    source: str
    cuts: Cuts
    form: str
    masked: bool
    batch: int
    training: bool
    features: frozenset[str]
    optional: bool = False

    def __repr__(self) -> str:
        mode = "training" if self.training else "evaluation"
        given = (
            f"mask {self.masked}, bias {self.optional}" if "keyword_only" in self.features else f"mask {self.masked}"
        )
        told = f"# {self.number}: cuts={self.cuts!r}, {self.form} inputs, {given}, batch {self.batch}, {mode}"
        return f"\n{told}\n{self.source}\n"

    def build(self) -> nn.Module:
        """Return the module in double precision, with the same weights each time."""
        name = f"<wild {self.number}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        space = namespace(name, self.source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = space["Drawn"]().double().train(self.training)
        assert isinstance(module, nn.Module)
        return module

    def call(self, batch: int | None = None, masked: bool | None = None) -> Call:
        """Return positional and keyword inputs for a batch, by default those that it is captured with."""
        size, given = self.batch if batch is None else batch, self.masked if masked is None else masked
        generator = torch.Generator().manual_seed(size)
        x, y = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        mask = {"mask": torch.rand(size, 4, generator=generator) > 0.4} if given else {}
        if self.optional:
            mask["bias"] = torch.randn(size, 1, generator=generator, dtype=torch.float64)
        if self.form == "dict":
            return ({"x": x, "y": y},), mask
        return ((), {"x": x, "y": y, **mask}) if self.form == "keyword" else ((x, y), mask)

    def reached(self) -> set[str]:
        """Return the modules whose outputs the loss depends on in the call that it is captured with."""
        module = self.build()
        made: list[tuple[str, Any]] = []
        for path, each in module.named_modules():
            each.register_forward_hook(lambda _, inputs, output, path=path: made.append((path, output)))
        args, kwargs = self.call()
        try:
            loss = spread_loss(module(*args, **kwargs), None)
            leaves = [(path, value) for path, output in made for value in tree_leaves(output)]
            values = [(path, value) for path, value in leaves if isinstance(value, Tensor) and value.requires_grad]
            found = torch.autograd.grad(loss, [value for _, value in values], allow_unused=True)
        except (RuntimeError, ValueError, IndexError):
            return set()
        return {path for (path, _), gradient in zip(values, found, strict=True) if gradient is not None}

    def runs(self) -> bool:
        """Whether the module itself runs and learns in every input kind that the checks ask for."""
        module = self.build()
        try:
            for batch, masked in input_kinds(self):
                for training in (True, False):
                    module.train(training)
                    torch.default_generator.manual_seed(1)
                    args, kwargs = self.call(batch, masked)
                    torch.autograd.backward(spread_loss(module(*args, **kwargs), None))
        except (RuntimeError, ValueError, IndexError):
            return False
        return True


@lru_cache(maxsize=8)
def namespace(name: str, source: str) -> dict[str, Any]:
    """Return what a program's source defines; its classes are the same ones each time."""
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "dataclass": dataclass, "__name__": __name__}
    exec(compile(source, name, "exec"), space)
    return space


def input_kinds(wild: Wild) -> list[tuple[int, bool]]:
    """Return the batch size and whether a mask is given, of every call that a program is tried with."""
    other = BATCHES[(BATCHES.index(wild.batch) + 1) % len(BATCHES)]
    return [(wild.batch, wild.masked), (other, wild.masked), (wild.batch, not wild.masked)]
