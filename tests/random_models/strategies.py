"""Random models over random graphs, and random cuts of them: what the property tests draw.

A drawn model is a class in plain PyTorch; its ``repr`` is the source that runs, one operation a line, so that what a
failure shrinks to can be pasted into a prompt.
"""

import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from hypothesis.vendor.pretty import RepresentationPrinter
from torch import Tensor, fx, nn

from dnifx.ir import Edge

Draw = st.DrawFn
UNUSUAL = [(False, False)] * 9 + [(True, False), (False, True)]
"""Whether a module is frozen, and whether it runs under no_grad."""
GO_ON = [False] + [True] * 7
"""Whether another line follows: asked before each, so that shrinking can take any line out."""


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
        name = "<drawn model>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        space: dict[str, object] = {"torch": torch, "nn": nn, "F": F, "Residual": Residual, "__name__": __name__}
        exec(compile(text, name, "exec"), space)
        drawn = space["Drawn"]
        assert isinstance(drawn, type)
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


@dataclass
class Draft:
    """A model while it is drawn: later values first, so that shrinking leads to chains."""

    draw: Draw
    values: list[Value] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    modules: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    serial: Iterator[int] = field(default_factory=lambda: count(1))
    width: int = 3
    frozen: bool = False
    no_grad: bool = False

    def turn(self, step: "Step") -> None:
        """Draw one line; every kind of line makes the same draws first, so that none is shorter than the plain ones."""
        self.width = self.draw(st.sampled_from([3, 4, 2]))
        self.frozen, self.no_grad = self.draw(st.sampled_from(UNUSUAL))
        step(self)

    def fresh(self, letter: str) -> str:
        return f"{letter}{next(self.serial)}"

    def some(self, accepts: Callable[[Value], bool]) -> list[Value]:
        return [value for value in reversed(self.values) if accepts(value)]

    def pick(self, accepts: Callable[[Value], bool]) -> Value:
        """Draw a value, more often a late one than an early one, so that models grow deep."""
        found = self.some(accepts)
        return self.draw(st.sampled_from([*found[:1] * 3, *found[:3], *found]))

    def root(self, name: str) -> str:
        while name in self.roots:
            name = self.roots[name]
        return name

    def can_write(self, value: Value) -> bool:
        inputs = {item.name for item in self.values if item.name.startswith("x")}
        root = self.root(value.name)
        return value.kind == "f" and value.writable and root not in self.kept and root not in inputs

    def keep(self, *names: str) -> None:
        """Note that autograd, or an alias we cannot name, holds these values: nothing may write them any more."""
        self.kept |= {self.root(name) for name in names}

    def add(
        self, feature: str, code: str, inputs: list[Value], *outputs: Value, view: str = "", **details: object
    ) -> None:
        """Append a line of one operation, whose view is undone by ``view``."""
        names = tuple(value.name for value in outputs)
        if view:
            self.roots[names[0]] = inputs[0].name
        op = Op(names, tuple(value.name for value in inputs), code, views=inputs[0].name if view else "", undo=view)
        self.append(feature, code, (replace(op, **details),), list(outputs))  # type: ignore[arg-type]

    def append(self, feature: str, code: str, ops: tuple[Op, ...], outputs: list[Value]) -> None:
        names = ", ".join(value.name for value in outputs)
        self.lines.append(Line(f"{names} = {code}", ops, feature))
        self.values += outputs


Step = Callable[[Draft], None]


@dataclass(frozen=True)
class Feature:
    """A kind of line: its name, when it can be drawn, and how."""

    name: str
    ready: Callable[[Draft], bool]
    step: Step
    weight: int = 1


def is_float(value: Value) -> bool:
    return value.kind == "f"


def is_dense(value: Value) -> bool:
    return value.kind == "f" and value.rank in (1, 2)


def is_vector(value: Value) -> bool:
    return value.kind == "f" and value.rank == 1


def is_sequence(value: Value) -> bool:
    return value.kind == "f" and value.rank == 2


def is_image(value: Value) -> bool:
    return value.kind == "f" and value.rank == 3


def is_wide(value: Value) -> bool:
    return value.kind == "f" and value.rank >= 1 and value.shape[0] >= 2


def apply_module(
    draft: Draft, feature: str, source: Value, maker: str, shape: tuple[int, ...], ordered: bool = False
) -> None:
    """Make a module, sometimes frozen, and call it, sometimes under no_grad."""
    name = draft.fresh("m")
    draft.parts.append(f"self.{name} = {maker}")
    frozen = ("nn.Linear" in maker or "nn.Conv" in maker) and draft.frozen
    if frozen:
        draft.parts.append(f"self.{name}.requires_grad_(False)")
    draft.modules[name] = (source.shape, shape, maker)
    call_module(draft, feature, name, source, shape, grad=source.grad or is_trained(draft, name), ordered=ordered)


def is_trained(draft: Draft, name: str) -> bool:
    return "Dropout" not in draft.modules[name][2] and f"self.{name}.requires_grad_(False)" not in draft.parts


def call_module(
    draft: Draft, feature: str, name: str, source: Value, shape: tuple[int, ...], grad: bool, ordered: bool
) -> None:
    output = Value(draft.fresh("v"), shape, grad=grad, contiguous="Dropout" not in draft.modules[name][2])
    draft.keep(source.name)
    draft.add(feature, f"self.{name}({source.name})", [source], output, ordered=ordered)
    if draft.no_grad:
        line = draft.lines[-1]
        draft.lines[-1] = replace(line, no_grad=True, ops=tuple(replace(op, no_grad=True) for op in line.ops))
        draft.values[-1] = replace(output, grad=False)


def linear(draft: Draft) -> None:
    source, width = draft.pick(is_dense), draft.width
    apply_module(draft, "linear", source, f"nn.Linear({source.shape[-1]}, {width})", (*source.shape[:-1], width))


def convolution(draft: Draft) -> None:
    source, width = draft.pick(is_image), draft.width
    apply_module(
        draft, "convolution", source, f"nn.Conv2d({source.shape[0]}, {width}, 3, padding=1)", (width, *source.shape[1:])
    )


def batch_norm(draft: Draft) -> None:
    source = draft.pick(lambda value: is_vector(value) or is_image(value))
    maker = f"nn.BatchNorm{'1d' if source.rank == 1 else '2d'}({source.shape[0]})"
    apply_module(draft, "batch norm", source, maker, source.shape, ordered=True)


def layer_norm(draft: Draft) -> None:
    source = draft.pick(is_dense)
    apply_module(draft, "layer norm", source, f"nn.LayerNorm({source.shape[-1]})", source.shape)


def dropout(draft: Draft) -> None:
    source = draft.pick(is_float)
    apply_module(draft, "dropout", source, "nn.Dropout(0.4)", source.shape, ordered=True)
    draft.keep(draft.values[-1].name)


def attention(draft: Draft) -> None:
    source, name = draft.pick(is_sequence), draft.fresh("m")
    draft.parts.append(f"self.{name} = nn.MultiheadAttention({source.shape[1]}, 1, batch_first=True)")
    output, weights = (
        Value(draft.fresh("v"), source.shape, grad=True),
        Value(draft.fresh("v"), (source.shape[0],) * 2, grad=True),
    )
    read = source.name
    draft.keep(read, output.name, weights.name)
    draft.add("attention", f"self.{name}({read}, {read}, {read})", [source], output, weights)


def sequential(draft: Draft) -> None:
    source, width, name = draft.pick(is_dense), draft.width, draft.fresh("m")
    draft.parts.append(f"self.{name} = nn.Sequential(nn.Linear({source.shape[-1]}, {width}), nn.Tanh())")
    inner, output = f"{name}_inner", Value(draft.fresh("v"), (*source.shape[:-1], width), grad=True)
    draft.keep(source.name, output.name)
    ops = (
        Op((inner,), (source.name,), f"self.{name}[0]({source.name})"),
        Op((output.name,), (inner,), f"self.{name}[1]({inner})"),
    )
    draft.append("sequential", f"self.{name}({source.name})", ops, [output])


def residual(draft: Draft) -> None:
    source, name = draft.pick(is_dense), draft.fresh("m")
    draft.parts.append(f"self.{name} = Residual({source.shape[-1]})")
    inner, bent, output = f"{name}_inner", f"{name}_bent", Value(draft.fresh("v"), source.shape, grad=True)
    draft.keep(source.name)
    ops = (
        Op((inner,), (source.name,), f"self.{name}.inner({source.name})"),
        Op((bent,), (inner,), f"torch.tanh({inner})"),
        Op((output.name,), (source.name, bent), f"{source.name} + {bent}"),
    )
    draft.append("residual", f"self.{name}({source.name})", ops, [output])


def callable_again(draft: Draft) -> list[tuple[str, Value]]:
    return [
        (name, value)
        for name, (shape, _, _) in draft.modules.items()
        for value in draft.some(is_float)
        if value.shape == shape
    ]


def shared_module(draft: Draft) -> None:
    name, source = draft.draw(st.sampled_from(callable_again(draft)))
    _, shape, maker = draft.modules[name]
    ordered = "Dropout" in maker or "BatchNorm" in maker
    call_module(
        draft, "shared module", name, source, shape, grad=source.grad or is_trained(draft, name), ordered=ordered
    )
    draft.keep(draft.values[-1].name)


def linears(draft: Draft, width: int | None = None) -> list[tuple[str, int, int]]:
    found = [
        (name, (shape[-1], out[-1])) for name, (shape, out, maker) in draft.modules.items() if "nn.Linear" in maker
    ]
    return [(name, *sizes) for name, sizes in found if width in (None, sizes[0])]


def tied_modules(draft: Draft) -> None:
    choices = [(name, out, value) for value in draft.some(is_dense) for name, _, out in linears(draft, value.shape[-1])]
    owner, width, source = draft.draw(st.sampled_from(choices))
    name = draft.fresh("m")
    draft.parts += [
        f"self.{name} = nn.Linear({source.shape[-1]}, {width})",
        f"self.{name}.weight = self.{owner}.weight",
    ]
    draft.modules[name] = (source.shape, (*source.shape[:-1], width), f"nn.Linear({source.shape[-1]}, {width})")
    call_module(draft, "tied modules", name, source, (*source.shape[:-1], width), grad=True, ordered=False)


def used_parameter(draft: Draft) -> None:
    choices = [(name, out, value) for value in draft.some(is_dense) for name, _, out in linears(draft, value.shape[-1])]
    owner, width, source = draft.draw(st.sampled_from(choices))
    output = Value(draft.fresh("v"), (*source.shape[:-1], width), grad=source.grad or is_trained(draft, owner))
    draft.keep(source.name)
    draft.add("used parameter", f"F.linear({source.name}, self.{owner}.weight)", [source], output)


def can_tie(draft: Draft) -> bool:
    return any(linears(draft, value.shape[-1]) for value in draft.some(is_dense))


def own_parameter(draft: Draft) -> None:
    source, name = draft.pick(is_float), draft.fresh("p")
    draft.parts.append(f"self.{name} = nn.Parameter(torch.rand({source.shape[-1]}))")
    draft.keep(source.name)
    draft.add("parameter", f"{source.name} * self.{name}", [source], Value(draft.fresh("v"), source.shape, grad=True))


def buffer(draft: Draft) -> None:
    source, name = draft.pick(is_float), draft.fresh("b")
    draft.parts.append(f"self.register_buffer('{name}', torch.rand({source.shape[-1]}))")
    draft.add(
        "buffer", f"{source.name} + self.{name}", [source], Value(draft.fresh("v"), source.shape, grad=source.grad)
    )


def activation(draft: Draft) -> None:
    source, function = (
        draft.pick(is_float),
        draft.draw(st.sampled_from(["torch.tanh", "torch.relu", "F.gelu", "torch.sigmoid"])),
    )
    output = Value(draft.fresh("v"), source.shape, grad=source.grad, contiguous=source.contiguous)
    draft.keep(source.name, output.name)
    draft.add("activation", f"{function}({source.name})", [source], output)


def inplace(draft: Draft) -> None:
    source = draft.pick(draft.can_write)
    others = draft.some(
        lambda value: is_float(value) and value.shape == source.shape and not shares(draft, value, source)
    )
    name, output = source.name, Value(draft.fresh("v"), source.shape, grad=source.grad, contiguous=source.contiguous)
    forms = {f"{name}.mul_(0.5)": f"{name} * 0.5", f"F.relu({name}, inplace=True)": f"torch.relu({name})"}
    forms |= {
        f"{name}.add_({other.name})": f"{name} + {other.name}" for other in others if source.grad or not other.grad
    }
    written = draft.draw(st.sampled_from([*forms, "module"]))
    if written == "module":
        module = draft.fresh("m")
        draft.parts.append(f"self.{module} = nn.ReLU(inplace=True)")
        written, forms = f"self.{module}({name})", {f"self.{module}({name})": f"torch.relu({name})"}
    other = [value for value in others if f"add_({value.name})" in written]
    op = Op(
        (output.name,), (name, *(value.name for value in other)), forms[written], writes=True, views=name, undo="new"
    )
    draft.roots[output.name] = name
    draft.append("in-place", written, (op,), [output])
    if "add_" not in written and "mul_" not in written:
        draft.keep(name)


def shares(draft: Draft, one: Value, two: Value) -> bool:
    return draft.root(one.name) == draft.root(two.name)


def pairs(draft: Draft) -> list[tuple[Value, Value]]:
    floats = draft.some(is_float)
    return [(one, two) for one in floats for two in floats if one.shape == two.shape]


def join(draft: Draft) -> None:
    one, two = draft.draw(st.sampled_from(pairs(draft)))
    sign = draft.draw(st.sampled_from(["+", "-", "*"]))
    if sign == "*":
        draft.keep(one.name, two.name)
    output = Value(draft.fresh("v"), one.shape, grad=one.grad or two.grad, contiguous=one.contiguous and two.contiguous)
    draft.add("join", f"{one.name} {sign} {two.name}", [one, two], output)


def concatenate(draft: Draft) -> None:
    one, two = draft.draw(st.sampled_from([pair for pair in pairs(draft) if pair[0].rank]))
    output = Value(draft.fresh("v"), (one.shape[0] + two.shape[0], *one.shape[1:]), grad=one.grad or two.grad)
    draft.add("concatenate", f"torch.cat(({one.name}, {two.name}), 1)", [one, two], output)


def mean(draft: Draft) -> None:
    source = draft.pick(lambda value: is_sequence(value) or is_image(value))
    dims, shape = ("1", source.shape[1:]) if source.rank == 2 else ("(2, 3)", source.shape[:1])
    draft.add("mean", f"{source.name}.mean({dims})", [source], Value(draft.fresh("v"), shape, grad=source.grad))


def can_flatten(value: Value) -> bool:
    return is_float(value) and value.rank > 1


def flat(value: Value) -> tuple[int]:
    return (torch.Size(value.shape).numel(),)


def view(draft: Draft) -> None:
    source = draft.pick(lambda value: can_flatten(value) and value.contiguous)
    name, output = source.name, Value(draft.fresh("v"), flat(source), grad=source.grad, writable=source.writable)
    draft.add("view", f"{name}.view({name}.size(0), -1)", [source], output, view="new.reshape(base.shape)")


def transpose(draft: Draft) -> None:
    source = draft.pick(is_sequence)
    shape = (source.shape[1], source.shape[0])
    output = Value(draft.fresh("v"), shape, grad=source.grad, writable=source.writable)
    draft.add("view", f"{source.name}.transpose(1, 2)", [source], output, view="new.transpose(1, 2)")


def slice_view(draft: Draft) -> None:
    source = draft.pick(is_wide)
    width = draft.draw(st.integers(1, source.shape[0] - 1))
    output = Value(draft.fresh("v"), (width, *source.shape[1:]), grad=source.grad, writable=source.writable)
    undo = f"torch.cat((new, base[:, {width}:]), 1)"
    draft.add("view", f"{source.name}[:, :{width}]", [source], output, view=undo)


def unsqueeze(draft: Draft) -> None:
    source = draft.pick(is_vector)
    output = Value(
        draft.fresh("v"), (1, *source.shape), grad=source.grad, contiguous=source.contiguous, writable=source.writable
    )
    draft.add("view", f"{source.name}.unsqueeze(1)", [source], output, view="new.squeeze(1)")


def chunk(draft: Draft) -> None:
    source = draft.pick(is_wide)
    total = source.shape[0]
    first = (total + 1) // 2
    code = draft.draw(
        st.sampled_from([f"{source.name}.chunk(2, 1)", f"torch.split({source.name}, [{first}, {total - first}], 1)"])
    )
    rest = source.shape[1:]
    pieces = [
        Value(draft.fresh("v"), (size, *rest), grad=source.grad, writable=False) for size in (first, total - first)
    ]
    draft.keep(source.name, *(piece.name for piece in pieces))
    draft.add("tuple", code, [source], *pieces)


def topk(draft: Draft) -> None:
    source = draft.pick(lambda value: is_vector(value) and is_wide(value))
    best = Value(draft.fresh("v"), (2,), grad=source.grad)
    index = Value(draft.fresh("i"), (2,), "i", limit=source.shape[0])
    draft.add("tuple with integers", f"{source.name}.topk(2, 1)", [source], best, index)


def argmax(draft: Draft) -> None:
    source = draft.pick(is_vector)
    draft.add("integer", f"{source.name}.argmax(1)", [source], Value(draft.fresh("i"), (), "i", limit=source.shape[0]))


def is_index(value: Value) -> bool:
    return value.kind == "i"


def embedding(draft: Draft) -> None:
    source, width, name = draft.pick(is_index), draft.width, draft.fresh("m")
    draft.parts.append(f"self.{name} = nn.Embedding({source.limit}, {width})")
    output = Value(draft.fresh("v"), (*source.shape, width), grad=True)
    draft.add("embedding", f"self.{name}({source.name})", [source], output)


def mask(draft: Draft) -> None:
    source = draft.pick(is_float)
    draft.add("mask", f"{source.name} > 0", [source], Value(draft.fresh("b"), source.shape, "b"))


def masked(draft: Draft) -> list[tuple[Value, Value]]:
    return [
        (one, two)
        for one in draft.some(lambda value: value.kind == "b")
        for two in draft.some(is_float)
        if one.shape == two.shape
    ]


def masked_fill(draft: Draft) -> None:
    where, source = draft.draw(st.sampled_from(masked(draft)))
    output = Value(draft.fresh("v"), source.shape, grad=source.grad)
    draft.add("mask", f"{source.name}.masked_fill({where.name}, 0.25)", [source, where], output)


def size(draft: Draft) -> None:
    source = draft.pick(is_float)
    draft.add("size", f"{source.name}.size(0)", [source], Value(draft.fresh("n"), (), "n"))


def is_size(value: Value) -> bool:
    return value.kind == "n"


def reshape(draft: Draft) -> None:
    source, batch = draft.pick(can_flatten), draft.pick(is_size)
    output = Value(draft.fresh("v"), flat(source), grad=source.grad, writable=False)
    draft.keep(source.name, output.name)
    draft.add("reshape by size", f"{source.name}.reshape({batch.name}, -1)", [source, batch], output)


def detach(draft: Draft) -> None:
    source = draft.pick(lambda value: is_float(value) and value.grad)
    draft.keep(source.name)
    draft.add("detach", f"{source.name}.detach()", [source], Value(draft.fresh("v"), source.shape, writable=False))


def always(accepts: Callable[[Value], bool]) -> Callable[[Draft], bool]:
    return lambda draft: bool(draft.some(accepts))


FEATURES = (
    Feature("linear", always(is_dense), linear),
    Feature("activation", always(is_float), activation),
    Feature("join", lambda draft: len(draft.some(is_float)) > 1, join),
    Feature("in-place", lambda draft: bool(draft.some(draft.can_write)), inplace, 2),
    Feature("convolution", always(is_image), convolution),
    Feature("batch norm", always(lambda value: is_vector(value) or is_image(value)), batch_norm),
    Feature("dropout", always(is_float), dropout),
    Feature("layer norm", always(is_dense), layer_norm),
    Feature("sequential", always(is_dense), sequential),
    Feature("residual", always(is_dense), residual),
    Feature("attention", always(is_sequence), attention),
    Feature("shared module", lambda draft: bool(callable_again(draft)), shared_module, 3),
    Feature("tied modules", can_tie, tied_modules, 6),
    Feature("used parameter", can_tie, used_parameter, 6),
    Feature("parameter", always(is_float), own_parameter),
    Feature("buffer", always(is_float), buffer),
    Feature("concatenate", always(is_float), concatenate),
    Feature("mean", always(lambda value: is_sequence(value) or is_image(value)), mean),
    Feature("flatten", always(lambda value: can_flatten(value) and value.contiguous), view),
    Feature("transpose", always(is_sequence), transpose),
    Feature("slice", always(is_wide), slice_view),
    Feature("unsqueeze", always(is_vector), unsqueeze),
    Feature("tuple", always(is_wide), chunk),
    Feature("tuple with integers", always(lambda value: is_vector(value) and is_wide(value)), topk),
    Feature("integer", always(is_vector), argmax),
    Feature("embedding", always(is_index), embedding, 3),
    Feature("mask", always(is_float), mask),
    Feature("masked fill", lambda draft: bool(masked(draft)), masked_fill, 3),
    Feature("size", always(is_float), size),
    Feature("reshape by size", lambda draft: bool(draft.some(can_flatten) and draft.some(is_size)), reshape, 6),
    Feature("detach", always(lambda value: is_float(value) and value.grad), detach),
)
"""Every kind of line, the plain ones first: what a failure shrinks to."""


def draw_inputs(draft: Draft) -> tuple[Value, ...]:
    shape = draft.draw(st.sampled_from([(3,), (2, 3), (2, 3, 3)]))
    inputs = [Value("x0", shape, writable=False, contiguous=True)]
    extra = draft.draw(st.sampled_from(["", "", "same", "integer"]))
    if extra == "same":
        inputs.append(Value("x1", shape, writable=False, contiguous=True))
    if extra == "integer":
        inputs.append(Value("x1", (), "i", limit=4))
    draft.values += inputs
    return tuple(inputs)


def draw_outputs(draft: Draft) -> tuple[Value, ...]:
    carrying = draft.some(lambda value: value.grad)
    needed = needed_for((op for line in draft.lines for op in line.ops), (carrying[0].name,))
    if not any(value.name in needed for value in carrying[1:]):
        head = Value(draft.fresh("v"), carrying[0].shape, grad=True)
        draft.add("head", f"torch.tanh({carrying[0].name})", carrying[:1], head)
    last = draft.some(lambda value: value.grad)[0]
    others = [
        value
        for value in draft.some(lambda value: value.kind in "fi")
        if not value.name.startswith("x") and value != last
    ]
    more = draft.draw(st.lists(st.sampled_from(others), max_size=2, unique=True)) if others else []
    return (last, *more)


@st.composite
def models(draw: Draw, max_lines: int = 9, without: frozenset[str] = frozenset()) -> Model:
    """Draw a model.

    Args:
        draw: Given by hypothesis.
        max_lines: How many lines its forward may have.
        without: Names of features that it must not have.
    """
    draft = Draft(draw)
    inputs = draw_inputs(draft)
    while not draft.some(lambda value: value.grad):
        draft.turn(linear if draft.some(is_dense) else convolution)
    while len(draft.lines) < max_lines and draw(st.sampled_from(GO_ON)):
        ready = [feature for feature in FEATURES if feature.name not in without and feature.ready(draft)]
        draft.turn(draw(st.sampled_from([feature.step for feature in ready for _ in range(feature.weight)])))
    outputs = draw_outputs(draft)
    form = draw(st.sampled_from(["tuple", "tuple", "dict"]))
    return Model(inputs, tuple(draft.parts), tuple(draft.lines), outputs, form)


@dataclass(frozen=True)
class NodeNamed:
    """A cut given as a callable on nodes, which prints itself."""

    names: frozenset[str]

    def __call__(self, node: fx.Node) -> bool:
        return node.name in self.names

    def __repr__(self) -> str:
        return f"NodeNamed({sorted(self.names)})"


Cuts = str | int | list[str | Edge] | NodeNamed


def module_paths(model: Model) -> dict[str, str]:
    """Return each call of a module, ``m1`` for the first and ``m1@1`` for the second, with the value that it makes."""
    calls = [(op.code, op.outputs[0]) for op in model.ops]
    calls += [(line.code, line.ops[-1].outputs[0]) for line in model.lines if len(line.ops) > 1]
    seen: Counter[str] = Counter()
    found = {}
    for code, output in calls:
        called = re.search(r"self\.([\w.\[\]]+)\(", code)
        if called:
            path = called[1].replace("[", ".").replace("]", "")
            found[f"{path}@{seen[path]}" if seen[path] else path] = output
            seen[path] += 1
    return found


def places(model: Model) -> dict[str, str]:
    """Return the values that a cut can stand after, each with its node: they carry a gradient, and the output needs them."""
    module = model.build()
    run = getattr(module, "atoms")  # noqa: B009 - written into the drawn class, unknown to type checkers
    values = run(*model.example(2))
    taken = {name for op in model.ops if model.needed & set(op.outputs) for name in op.inputs}
    names = node_names(module)
    return {name: names[name] for name in names if name in taken and getattr(values[name], "requires_grad", False)}


@st.composite
def cut_sets(
    draw: Draw, model: Model, forms: tuple[str, ...] = ("paths", "nodes", "parts", "glob", "edges", "each")
) -> Cuts:
    """Draw cuts for a model, in one of the forms that ``decouple`` takes; only the last three can be impossible."""
    names = places(model)
    paths = [path for path, value in module_paths(model).items() if value in names]
    possible = [form for form in forms if {"nodes": names, "edges": names, "parts": True}.get(form, paths)]
    form = draw(st.sampled_from(possible or ["parts"]))
    if form == "glob":
        return draw(st.sampled_from(["m*", *(f"{path}*" for path in paths if "." not in path and "@" not in path)]))
    if form == "parts":
        return draw(st.integers(2, max(2, min(4, len(names) + 1))))
    if form == "nodes":
        return NodeNamed(frozenset(draw(some_of(list(names.values())))))
    if form == "edges":
        return list(draw(edge_cuts(model)))
    return "each" if form == "each" else list(draw(some_of(paths)))


def some_of(names: list[str]) -> st.SearchStrategy[list[str]]:
    masks = st.integers(1, 2 ** len(names) - 1)
    return masks.map(lambda mask: [name for place, name in enumerate(names) if mask >> place & 1])


@st.composite
def edge_cuts(draw: Draw, model: Model) -> list[Edge]:
    """Draw one value and name every edge that leaves it."""
    source = trace_values(model.build())[draw(st.sampled_from(list(places(model))))]
    return [Edge(source.name, user.name) for user in source.users if user.op != "output"]
