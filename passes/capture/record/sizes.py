"""Sizes that stay symbolic: numbers that Python takes for ints and floats, and that remember how they were computed."""

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, fx


class Owner(Protocol):
    """The recorder that hands symbolic numbers out and hears when Python looks at their values."""

    active: bool

    def compared(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> None:
        """Python took a decision on ``function(*operands) == value``."""

    def consumed(self, number: "Number") -> None:
        """Python took the plain value of ``number`` where no expression can follow."""


class Expression:
    """How a symbolic number is computed.

    Attributes:
        owner: The recorder it belongs to.
        function: The Python function that makes it of ``operands``; None where it is read from a graph value.
        operands: Numbers, symbolic or plain; or, where it is read, an origin, the dimension (None: the value itself) and
            the tensor method that gives it (size or stride).
        data: Whether it depends on the values in tensors, and not on their sizes alone.
        node: The graph node that computes it, once it has one.
    """

    __slots__ = ("data", "function", "node", "operands", "owner")

    def __init__(
        self, owner: Owner, function: Callable[..., Any] | None, operands: tuple[Any, ...], data: bool
    ) -> None:
        self.owner = owner
        self.function = function
        self.operands = operands
        self.data = data
        self.node: fx.Node | None = None


class SymbolicInt(int):
    """An int that remembers its expression."""

    expression: Expression

    __hash__ = int.__hash__


class SymbolicFloat(float):
    """A float that remembers its expression."""

    expression: Expression

    __hash__ = float.__hash__


Number = SymbolicInt | SymbolicFloat


def symbolic(
    value: Any, owner: Owner, function: Callable[..., Any] | None, operands: tuple[Any, ...], data: bool
) -> Any:
    """Return ``value`` with its expression where it is a number, and unchanged where it is anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    number = SymbolicInt(value) if isinstance(value, int) else SymbolicFloat(value)
    number.expression = Expression(owner, function, operands, data)
    return number


def plain_number(value: Any) -> Any:
    """Return the int or float that a symbolic number stands for, and anything else unchanged."""
    if isinstance(value, SymbolicInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, SymbolicFloat) else value


def plain(value: Any) -> Any:
    """Return ``value`` with the symbolic numbers in its tuples, lists and dicts made plain; itself where there are none."""
    if isinstance(value, SymbolicInt | SymbolicFloat):
        return plain_number(value)
    if type(value) in (tuple, list):
        parts = [plain(part) for part in value]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return type(value)(parts) if changed else value
    if type(value) is dict:
        items = {key: plain(item) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in value) else value
    return value


def _compute(function: Callable[..., Any], operands: tuple[Any, ...], number: Number) -> Any:
    value = function(*map(plain_number, operands))
    owner = number.expression.owner
    if not owner.active:
        return value
    data = any(isinstance(item, SymbolicInt | SymbolicFloat) and item.expression.data for item in operands)
    return symbolic(value, owner, function, operands, data)


def _binary(function: Callable[..., Any], reverse: bool) -> Callable[[Any, Any], Any]:
    def method(self: Number, other: Any) -> Any:
        if isinstance(other, bool | int | float):
            return _compute(function, (other, self) if reverse else (self, other), self)
        if isinstance(other, Tensor):
            return NotImplemented  # the tensor's own operation is recorded, with this number as it is
        if self.expression.owner.active:
            self.expression.owner.consumed(self)  # [0] * n unrolls to n items, NumPy takes the value
        pair = (other, plain_number(self)) if reverse else (plain_number(self), other)
        return function(*pair)

    return method


def _unary(function: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda self: _compute(function, (self,), self)


def _comparison(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def method(self: Number, other: Any) -> Any:
        if not isinstance(other, bool | int | float):
            return NotImplemented
        value = function(plain_number(self), plain_number(other))
        if self.expression.owner.active:
            self.expression.owner.compared(function, (self, other), value)
        return value

    return method


def _truth(self: Number) -> bool:
    value = bool(plain_number(self))
    if self.expression.owner.active:
        self.expression.owner.compared(operator.truth, (self,), value)
    return value


def _conversion(kind: type) -> Callable[[Any], Any]:
    def method(self: Number) -> Any:
        value = kind(plain_number(self))
        if self.expression.owner.active:
            if kind is int and isinstance(self, SymbolicFloat):
                self.expression.owner.compared(int, (self,), value)  # Python sees no more than the truncated value
            else:
                self.expression.owner.consumed(self)
        return value

    return method


_BINARY: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow")},
    **{
        "lshift": operator.lshift,
        "rshift": operator.rshift,
        "and": operator.and_,
        "or": operator.or_,
        "xor": operator.xor,
    },
    "divmod": lambda left, right: (left // right, left % right),
}
_FLOAT_ONLY = frozenset({"lshift", "rshift", "and", "or", "xor"})
_UNARY: dict[str, Callable[..., Any]] = {
    **{"neg": operator.neg, "pos": operator.pos, "abs": operator.abs},
    **{"ceil": math.ceil, "floor": math.floor, "trunc": math.trunc, "round": round},
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _equip(kind: type) -> None:
    """Give a class the arithmetic that keeps expressions."""
    for name, function in _BINARY.items():
        if kind is SymbolicInt or name not in _FLOAT_ONLY:
            setattr(kind, f"__{name}__", _divmod if name == "divmod" else _binary(function, reverse=False))
            if name != "divmod":
                setattr(kind, f"__r{name}__", _binary(function, reverse=True))
    for name, function in _UNARY.items():
        setattr(kind, f"__{name}__", _rounded if name == "round" else _unary(function))
    for name in _COMPARISONS:
        setattr(kind, f"__{name}__", _comparison(getattr(operator, name)))
    setattr(kind, "__bool__", _truth)  # noqa: B010 - a fixed name, but not one that type checkers let us override
    setattr(kind, "__int__", _conversion(int))  # noqa: B010
    setattr(kind, "__float__", _conversion(float))  # noqa: B010
    setattr(kind, "__copy__", plain_number)  # noqa: B010
    setattr(kind, "__deepcopy__", lambda self, memo: plain_number(self))  # noqa: B010
    setattr(kind, "__reduce__", lambda self: (type(plain_number(self)), (plain_number(self),)))  # noqa: B010


def _divmod(self: Number, other: Any) -> Any:
    return self // other, self % other


def _rounded(self: Number, digits: int | None = None) -> Any:
    return _compute(round, (self,) if digits is None else (self, digits), self)


_equip(SymbolicInt)
_equip(SymbolicFloat)
