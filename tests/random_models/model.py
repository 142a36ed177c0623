"""A drawn model: a class in plain PyTorch, with the operations that it consists of.

Its ``repr`` is the source that runs, one operation a line, so that what a failure shrinks to can be pasted into a prompt.
"""

import linecache
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from hypothesis.vendor.pretty import RepresentationPrinter
from torch import Tensor, fx, nn

FILE = "<drawn model>"
"""The name of the file that the source of a drawn model stands in, for tracebacks."""


class Residual(nn.Module):
    """A block of a user's own, opened by tracing: ``x + tanh(inner(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


@dataclass(frozen=True)
class Value:
    """What is known of a value while a model is drawn: its shape without the batch; its kind, one of ``f i b n``."""

    name: str
    shape: tuple[int, ...]
    kind: str = "f"
    limit: int = 0
    grad: bool = False
    contiguous: bool = False
    writable: bool = True

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        dtype = {"f": "float", "i": f"int < {self.limit}", "b": "bool", "n": "size"}[self.kind]
        return f"{self.name}: {dtype} [n{''.join(f', {size}' for size in self.shape)}]"


@dataclass(frozen=True)
class Op:
    """One operation, as the oracle in ``reference.py`` runs it.

    Attributes:
        outputs: The names that it binds.
        inputs: The names of the values that it reads.
        code: The expression, with ``self`` the module.
        writes: Whether it writes ``inputs[0]`` in place; ``code`` is then the same without writing.
        views: The name that its only output is a view of, if any.
        undo: From ``new``, the view after a write, and the old ``base``: the new base.
        no_grad: Whether it runs under ``torch.no_grad()``.
        ordered: Whether it draws random numbers or updates buffers, so that its turn matters.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    code: str
    writes: bool = False
    views: str = ""
    undo: str = ""
    no_grad: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a forward and the operations it consists of."""

    code: str
    ops: tuple[Op, ...]
    feature: str
    no_grad: bool = False


@dataclass(frozen=True, repr=False)
class Model:
    """A drawn model: its inputs, what it is made of, what it computes, what it returns."""

    inputs: tuple[Value, ...]
    parts: tuple[str, ...]
    lines: tuple[Line, ...]
    outputs: tuple[Value, ...]
    form: str = "tuple"

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(op for line in self.lines for op in line.ops)

    @property
    def needed(self) -> frozenset[str]:
        """The values that the outputs are computed from, and those that are written in place."""
        return needed_for(self.ops, (value.name for value in self.outputs))

    @property
    def features(self) -> frozenset[str]:
        """What a property run on this model reaches."""
        reads = [name for op in self.ops for name in op.inputs]
        named = (
            {line.feature for line in self.lines}
            | {"inputs" for _ in self.inputs[1:]}
            | {"outputs" for _ in self.outputs[1:]}
        )
        named |= {"fan-out" for name in reads if reads.count(name) > 1} | {
            "no_grad" for line in self.lines if line.no_grad
        }
        named |= {"frozen" for part in self.parts if "requires_grad_(False)" in part}
        named |= {"shared parameter" for part in self.parts if ".weight = " in part}
        return frozenset(named)

    @property
    def source(self) -> str:
        """The class, ready to be pasted below the usual imports of torch."""
        return "\n".join(
            [f"class Drawn(nn.Module):  # {'; '.join(map(str, self.inputs))}", *self._constructor(), *self._forward()]
        )

    def __repr__(self) -> str:
        return f"\n{self.source}\n"

    def _repr_pretty_(self, printer: RepresentationPrinter, cycle: bool) -> None:
        """Print the source where a failing example is reported, for IPython's and hypothesis' printers."""
        printer.text(repr(self))

    def _constructor(self) -> Iterator[str]:
        yield "    def __init__(self):"
        yield "        super().__init__()"
        yield from (f"        {part}" for part in self.parts)

    def _forward(self) -> Iterator[str]:
        yield f"    def forward(self, {', '.join(value.name for value in self.inputs)}):"
        for line in self.lines:
            yield f"        with torch.no_grad(): {line.code}" if line.no_grad else f"        {line.code}"
        names = [value.name for value in self.outputs]
        pairs = ", ".join(f"'out_{name}': {name}" for name in names)
        single = names[0] if len(names) == 1 else f"({', '.join(names)})"
        yield f"        return {{{pairs}}}" if self.form == "dict" else f"        return {single}"

    def _atoms(self) -> Iterator[str]:
        yield f"    def atoms(self, {', '.join(value.name for value in self.inputs)}):"
        for line in self.lines:
            region = "with torch.no_grad(): " if line.no_grad else ""
            yield from (f"        {region}{line.code if op.writes else _binding(op)}" for op in line.ops)
        bound = [name for op in self.ops for name in op.outputs]
        yield f"        return {{{', '.join(f'{name!r}: {name}' for name in bound)}}}"

    def _snapshots(self) -> Iterator[str]:
        head, *steps, _ = self._atoms()
        yield head.replace("atoms", "snapshots")
        yield "        seen = {}"
        for op, text in zip(self.ops, steps, strict=True):
            yield text
            yield from (f"        seen[{name!r}] = torch.as_tensor({name}).clone()" for name in op.outputs)
        yield "        return seen"

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the module, with weights from ``seed``."""
        text = "\n".join([self.source, *self._atoms(), *self._snapshots(), ""])
        linecache.cache[FILE] = (len(text), None, text.splitlines(keepends=True), FILE)
        drawn = class_of(text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = drawn().to(dtype)
        assert isinstance(module, nn.Module)
        return module

    def example(self, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Return inputs for a batch of that size."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(_example(value, batch, generator, dtype) for value in self.inputs)


def needed_for(ops: Iterable[Op], outputs: Iterable[str]) -> frozenset[str]:
    names = set(outputs)
    for op in reversed(list(ops)):
        if op.writes or names & set(op.outputs):
            names |= {*op.inputs, *op.outputs} if op.writes else set(op.inputs)
    return frozenset(names)


@lru_cache(maxsize=8)
def class_of(text: str) -> type:
    """Return the class that a source defines, the same one each time."""
    space: dict[str, object] = {"torch": torch, "nn": nn, "F": F, "Residual": Residual, "__name__": __name__}
    exec(compile(text, FILE, "exec"), space)
    drawn = space["Drawn"]
    assert isinstance(drawn, type)
    return drawn


def _binding(op: Op) -> str:
    return f"{', '.join(op.outputs)} = {op.code}"


def _example(value: Value, batch: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    shape = (batch, *value.shape)
    if value.kind == "i":
        return torch.randint(value.limit, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def trace_values(module: nn.Module) -> dict[str, fx.Node]:
    """Return the graph node that bears each value, as plain symbolic tracing names nodes."""
    tracer = fx.Tracer()
    tracer.traced_func_name = "atoms"
    bound = tracer.trace(module).output_node().args[0]
    assert isinstance(bound, dict)
    return dict(bound)


def node_names(module: nn.Module) -> dict[str, str]:
    """Return the name of the graph node that bears each value."""
    return {value: node.name for value, node in trace_values(module).items()}
