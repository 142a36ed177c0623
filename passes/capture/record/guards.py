"""What Python sees of tensors while a model is recorded: sizes, which stay symbolic, and values, which are guarded."""

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from dnifx.passes.capture.record import functions
from dnifx.passes.capture.record.escapes import Escapes
from dnifx.passes.capture.record.node_values import Origin
from dnifx.passes.capture.record.sizes import Number, Owner, SymbolicFloat, SymbolicInt, plain, plain_number, symbolic
from dnifx.passes.capture.record.writer import Writer
from dnifx.runtime.emitted import ops
from dnifx.runtime.module.input_kinds import SIZES_ALONE

_LARGEST_GUARD = 4096
_CONVERSIONS: dict[str, Callable[..., Any]] = {
    **{"__bool__": bool, "is_nonzero": bool, "__int__": int, "__float__": float, "__complex__": complex},
    "__index__": operator.index,
}
"""What Python makes of a tensor of one element, by the method that it calls."""


class Run(Owner, Protocol):
    """The recorder, as far as it matters here."""

    def hazard(self, construct: str, hard: bool = False, draws: bool = False) -> None:
        """Note something that the graph alone does not repeat."""

    def place(self) -> str:
        """Return where the model stands."""

    def paused(self) -> AbstractContextManager[None]:
        """Look away within the block."""


class Checks:
    """Hands sizes out and writes guards.

    Args:
        run: The recorder.
        writer: Its graph.
        escapes: The tensors that it did not see being made.

    Attributes:
        guards: How many guards the graph holds.
    """

    def __init__(self, run: Run, writer: Writer, escapes: Escapes) -> None:
        self.guards = 0
        self._run = run
        self._writer = writer
        self._escapes = escapes
        self._guarded: set[tuple[Any, ...]] = set()

    def pieces(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node, result: Any) -> None:
        """Guard the number of pieces of a split, where sizes decide it."""
        if name not in functions.PIECES or not isinstance(result, tuple | list):
            return
        given = (*args[1:2], kwargs.get("chunks"), kwargs.get("split_size_or_sections"))
        asked = next((item for item in given if item is not None), None)
        counted = name in ("chunk", "tensor_split") and isinstance(asked, int) and asked == len(result)
        fixed = isinstance(asked, list | tuple | Tensor) or counted
        if not fixed:
            written = self._writer.add_after(ops.guard_length, (node, len(result), self._run.place()), "guard_length")
            if node not in self._writer.ragged:
                written.meta[SIZES_ALONE] = True
            self.guards += 1

    def size(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Hand out the sizes or strides of a tensor that the graph makes, with where they come from."""
        first = args[0] if args else kwargs.get("self")
        origin = self._writer.origin(first) if isinstance(first, Tensor) else None
        if origin is None or not isinstance(first, Tensor):
            return result
        data = origin.base in self._writer.ragged
        method = "stride" if name == "stride" else "size"

        def part(index: int, value: int) -> Any:
            return symbolic(int(value), self._run, None, (origin, index, method), data)

        if isinstance(result, tuple):
            return type(result)([part(index, value) for index, value in enumerate(result)])
        if name in ("numel", "nelement"):
            return _product([part(index, value) for index, value in enumerate(first.shape)], result)
        index = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return part(int(plain_number(index)), result)

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Python reads the content of a tensor."""
        tensor = args[0] if args else None
        if not isinstance(tensor, Tensor) or not (self._writer.knows(tensor) or self._escapes.holds(tensor)):
            return result
        if name in ("equal", "allclose", "__contains__"):
            target = {"equal": torch.equal, "allclose": torch.allclose}.get(name, operator.contains)
            node = self._writer.add(
                "call_function", target, self._writer.argument(tuple(args)), self._writer.argument(dict(kwargs))
            )
            self._guard(node, result, f"{name} of tensors")
            return result
        if name == "item" and isinstance(result, int | float) and not isinstance(result, bool):
            return self._item(self._writer.tensor(tensor), result)
        if tensor.numel() > _LARGEST_GUARD:
            self._run.hazard(f"{name}() of a tensor with {tensor.numel()} elements", hard=True)
            return result
        construct = f"{name.strip('_')}() of a tensor"
        if name in _CONVERSIONS:
            self._read(tensor, "call_function", _CONVERSIONS[name], result, construct)
        else:
            with self._run.paused():
                seen = result if isinstance(result, list) else tensor.tolist()
            self._read(tensor, "call_method", "tolist", seen, construct)
        return result

    def _read(self, tensor: Tensor, op: str, target: Any, value: Any, construct: str) -> None:
        """Guard what Python made of a tensor; the graph reads it where the model did, since it may be written before and after."""
        source = self._writer.tensor(tensor)
        key = (target, source, tensor._version)
        if key not in self._guarded:
            self._guarded.add(key)
            self._guard(self._writer.add(op, target, (source,)), value, construct)

    def _item(self, source: fx.Node, result: float) -> Any:
        if source in self._writer.tainted or isinstance(result, float):
            self._run.hazard("item() of a tensor")
        node = self._writer.add("call_method", "item", (source,))
        return symbolic(result, self._run, None, (Origin(node), None, ""), True)

    def _guard(self, node: Any, value: Any, construct: str, data: bool = True) -> None:
        """Let the graph check that a value is what Python saw."""
        key = (node, repr(value))
        if not isinstance(node, fx.Node):
            return
        if data and node in self._writer.tainted:
            self._run.hazard(construct)
        if key in self._guarded:
            return
        self._guarded.add(key)
        self.equal(node, self._writer.literal(plain(value)), data)

    def equal(self, node: fx.Node, expected: Any, data: bool = True) -> None:
        """Write a guard that a node's value, which depends on ``data`` or on sizes alone, is ``expected``."""
        written = self._writer.add_after(ops.guard, (node, expected, self._run.place()), "guard")
        if not data:
            written.meta[SIZES_ALONE] = True
        self.guards += 1

    def compared(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> None:
        """Python took a decision on numbers; see ``sizes.Owner``."""
        key = (function, *(_identity(item) for item in operands))
        if key in self._guarded:
            return
        self._guarded.add(key)
        items = tuple(self._writer.operand(item) for item in operands)
        for item in operands:
            self._writer.keep(item)
        if any(isinstance(item, fx.Node) for item in items):
            data = any(isinstance(item, SymbolicInt | SymbolicFloat) and item.expression.data for item in operands)
            self._guard(
                self._writer.add_after(function, items), value, "a decision on a value computed from tensors", data
            )

    def consumed(self, number: Number) -> None:
        """Python took the plain value of a number; see ``sizes.Owner``."""
        construct = "a plain number computed from tensors"
        self._guard(self._writer.number(number), plain_number(number), construct, number.expression.data)


def _product(sizes: list[Any], fallback: Any) -> Any:
    total = sizes[0] if sizes else fallback
    for size in sizes[1:]:
        total = total * size
    return total


def _identity(item: Any) -> Any:
    """Return what tells two operands of a comparison apart."""
    if isinstance(item, SymbolicInt | SymbolicFloat):
        expression = item.expression
        if expression.function is None:
            origin, *read = expression.operands
            return origin.base, origin.path, *read
        return expression.function, tuple(map(_identity, expression.operands))
    return type(item), item
