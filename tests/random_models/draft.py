"""A model while it is drawn, line by line, and what the kinds of lines ask of its values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from hypothesis import strategies as st

from tests.random_models.model import Line, Op, Value

Draw = st.DrawFn
UNUSUAL = [(False, False)] * 9 + [(True, False), (False, True)]
"""Whether a module is frozen, and whether it runs under no_grad."""


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


def always(accepts: Callable[[Value], bool]) -> Callable[[Draft], bool]:
    return lambda draft: bool(draft.some(accepts))
