"""Symbolic sizes: numbers that behave as ints and floats, and remember how they were computed."""

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, fx


class Owner(Protocol):
    """The recorder that makes symbolic numbers, and is told when Python looks at their values."""

    active: bool

    def compared(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> None:
        """Python took a decision on ``function(*operands) == value``."""

    def consumed(self, number: "Number") -> None:
        """Python took the plain value of ``number`` where no expression can follow."""

    def formatted(self, number: "Number") -> None:
        """Python made a text of ``number``."""


class Expression:
    """How a symbolic number is computed.

    Attributes:
        owner: The recorder it belongs to.
        function: The Python function that makes it of ``operands``; None where it is read from a graph value.
        operands: Numbers, symbolic or plain. Where the number is read from the graph: a ``NodeValue``, the dimension (None for
            the value itself) and the tensor method that gives it (size or stride).
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


def _text(make: Callable[..., str]) -> Callable[..., str]:
    def method(self: Number, *args: Any) -> str:
        if self.expression.owner.active:
            self.expression.owner.formatted(self)
        return make(plain_number(self), *args)

    return method


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


_BINARY = ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow")
_INTEGER_BINARY = ("lshift", "rshift", "and", "or", "xor")
_UNARY = (operator.neg, operator.pos, operator.abs, math.ceil, math.floor, math.trunc)
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _equip(kind: type) -> None:
    """Give a class the arithmetic that keeps expressions."""
    methods: dict[str, Any] = {f"__{function.__name__}__": _unary(function) for function in _UNARY}
    for name in (*_BINARY, *_INTEGER_BINARY) if kind is SymbolicInt else _BINARY:
        function = getattr(operator, f"__{name}__")
        methods[f"__{name}__"], methods[f"__r{name}__"] = _binary(function, False), _binary(function, True)
    methods.update((f"__{name}__", _comparison(getattr(operator, name))) for name in _COMPARISONS)
    methods |= {"__divmod__": _divmod, "__round__": _rounded, "__bool__": _truth}
    methods |= {"__int__": _conversion(int), "__float__": _conversion(float)}
    methods.update((name, _text(getattr(kind.__mro__[1], name))) for name in ("__format__", "__repr__", "__str__"))
    methods |= {"__copy__": plain_number, "__deepcopy__": lambda self, memo: plain_number(self)}
    methods["__reduce__"] = lambda self: (type(plain_number(self)), (plain_number(self),))
    for name, method in methods.items():
        setattr(kind, name, method)


def _divmod(self: Number, other: Any) -> Any:
    return self // other, self % other


def _rounded(self: Number, digits: int | None = None) -> Any:
    return _compute(round, (self,) if digits is None else (self, digits), self)


_equip(SymbolicInt)
_equip(SymbolicFloat)
