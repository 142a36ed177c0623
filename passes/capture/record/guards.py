"""What Python sees of tensors during a recording: sizes, which stay symbolic, and values, which are guarded."""

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from dnifx.passes.capture.record import functions
from dnifx.passes.capture.record.hazards import model_line
from dnifx.passes.capture.record.node_values import NodeValue
from dnifx.passes.capture.record.open_modules import OpenModules
from dnifx.passes.capture.record.sizes import Number, Owner, SymbolicFloat, SymbolicInt, plain, plain_number, symbolic
from dnifx.passes.capture.record.unseen import UnseenTensors
from dnifx.passes.capture.record.writer import Writer
from dnifx.runtime.emitted import ops
from dnifx.runtime.net.input_kinds import SIZES_ALONE

_LARGEST_GUARD = 4096
_CONVERSIONS: dict[str, Callable[..., Any]] = {
    **{"__bool__": bool, "is_nonzero": bool, "__int__": int, "__float__": float, "__complex__": complex},
    "__index__": operator.index,
}
"""What Python makes of a tensor with one element, by the method that it calls."""


class RunningRecorder(Owner, Protocol):
    """The recorder, as far as it matters here."""

    def paused(self) -> AbstractContextManager[None]:
        """Record nothing within the block."""


class Guards:
    """Gives Python symbolic sizes, and writes guards on what Python reads.

    Args:
        recorder: The recorder.
        writer: Its graph.
        modules: The modules that run.
        unseen: The tensors that the recorder did not see being made.

    Attributes:
        count: Number of guards in the graph.
        unused: The lines that draw floats which nothing in the graph uses: Python may have taken them unseen.
    """

    def __init__(self, recorder: RunningRecorder, writer: Writer, modules: OpenModules, unseen: UnseenTensors) -> None:
        self.count = 0
        self._recorder = recorder
        self._writer = writer
        self._modules = modules
        self._unseen = unseen
        self._guarded: set[tuple[Any, ...]] = set()
        self._watched: list[tuple[Number, str]] = []
        self.unused: dict[str, None] = {}

    def pieces(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node, result: Any) -> None:
        """Guard the number of pieces of a split, where sizes decide it."""
        if name not in functions.PIECES or not isinstance(result, tuple | list):
            return
        given = (*args[1:2], kwargs.get("chunks"), kwargs.get("split_size_or_sections"))
        asked = next((item for item in given if item is not None), None)
        counted = name in ("chunk", "tensor_split") and isinstance(asked, int) and asked == len(result)
        if not (isinstance(asked, list | tuple | Tensor) or counted):
            self._add(ops.guard_length, node, len(result), data=node in self._writer.ragged)

    def size(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Return the sizes or strides of a tensor in the graph as symbolic numbers."""
        first = args[0] if args else kwargs.get("self")
        value = self._writer.find(first) if isinstance(first, Tensor) else None
        replaced = value is None and isinstance(first, Tensor) and self._writer.is_replaced(first)
        if isinstance(first, Tensor) and replaced:
            value = NodeValue(self._writer.tensor(first))
        if value is None or not isinstance(first, Tensor):
            return result
        data = replaced or value.base in self._writer.ragged  # the sizes of the inputs do not say those of a buffer
        method = "stride" if name == "stride" else "size"

        def part(index: int, number: int) -> Any:
            return symbolic(int(number), self._recorder, None, (value, index, method), data)

        if isinstance(result, tuple):
            return type(result)([part(index, number) for index, number in enumerate(result)])
        if name in ("numel", "nelement"):
            parts = [part(index, number) for index, number in enumerate(first.shape)]
            return reduce(operator.mul, parts) if parts else result
        index = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return part(int(plain_number(index)), result)

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Python reads the content of a tensor."""
        tensor = args[0] if args else None
        if not isinstance(tensor, Tensor) or not (self._writer.knows(tensor) or self._unseen.find(tensor)):
            return result
        if name in ("equal", "allclose", "__contains__"):
            compare = {"equal": torch.equal, "allclose": torch.allclose}.get(name, operator.contains)
            arguments = self._writer.argument(tuple(args)), self._writer.argument(dict(kwargs))
            self._guard(self._writer.add("call_function", compare, *arguments), result, f"{name} of tensors")
            return result
        if name == "item" and isinstance(result, int | float) and not isinstance(result, bool):
            return self._item(self._writer.tensor(tensor), result)
        if tensor.numel() > _LARGEST_GUARD:
            self._modules.hazard(f"{name}() of a tensor with {tensor.numel()} elements", hard=True)
            return result
        op, target = ("call_function", _CONVERSIONS[name]) if name in _CONVERSIONS else ("call_method", "tolist")
        seen = result
        if name not in _CONVERSIONS and not isinstance(result, list):
            with self._recorder.paused():
                seen = tensor.tolist()
        source = self._writer.tensor(tensor)
        key = (target, source, tensor._version)
        if key not in self._guarded:  # the graph reads where the model did: the tensor may be written before and after
            self._guarded.add(key)
            self._guard(self._writer.add(op, target, (source,)), seen, f"{name.strip('_')}() of a tensor")
        return result

    def _item(self, source: fx.Node, result: float) -> Any:
        if source in self._writer.tainted or isinstance(result, float):
            self._hazard(source, "item() of a tensor")
        node = self._writer.add("call_method", "item", (source,))
        number = symbolic(result, self._recorder, None, (NodeValue(node), None, ""), True)
        if source in self._writer.drawn:
            self.watch(number)
        return number

    def watch(self, number: Number) -> None:
        """Note a number that was drawn: Python may take it in a way that nothing shows, as the place in a list."""
        self._watched.append((number, model_line()))

    def forget(self, base: fx.Node, most: int) -> None:
        """Forget the numbers that were just read from a value, as torch looks at an array that is an index."""
        while most and self._watched and self._watched[-1][0].expression.operands[0].base is base:
            self._watched.pop()
            most -= 1

    def settle(self) -> None:
        """Guard the integers that were drawn and that nothing in the graph uses; note such floats."""
        for number, line in self._watched:
            whole = isinstance(number, SymbolicFloat)  # a comparison shows all of a decision on a float
            if any(whole or not is_check(user) for user in self._writer.number(number).users):
                continue
            if isinstance(number, SymbolicInt):
                self.consumed(number)
            else:
                self.unused[line] = None
        self._watched.clear()

    def drawn(self, node: fx.Node, value: Any) -> None:
        """Let the graph check that what a draw gave, or decided, is what Python saw."""
        self._guard(node, value, "a draw")

    def _guard(self, node: Any, value: Any, construct: str, data: bool = True) -> None:
        """Let the graph check, once, that a value is what Python saw."""
        if not isinstance(node, fx.Node):
            return
        if data and node in self._writer.tainted:
            self._hazard(node, construct)
        key = (node, repr(value))
        if key not in self._guarded:
            self._guarded.add(key)
            self.equal(node, self._writer.literal(plain(value)), data)

    def _hazard(self, node: fx.Node, construct: str) -> None:
        """Note that Python reads the value of a node, which another call draws anew or computes by other parameters."""
        draw = self._writer.drawn.get(node)
        self._modules.hazard(f"a decision on what {draw} draws" if draw else construct, draws=draw is not None)

    def equal(self, node: fx.Node, expected: Any, data: bool = True) -> None:
        """Write a guard that a node's value is ``expected``; without ``data`` the value depends on sizes alone."""
        self._add(ops.guard, node, expected, data)

    def _add(self, guard: Callable[..., None], node: fx.Node, expected: Any, data: bool) -> None:
        written = self._writer.add_after(guard, (node, expected, self._modules.location()), guard.__name__)
        if not data:
            written.meta[SIZES_ALONE] = True
        self.count += 1

    def compared(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> None:
        """Python took a decision on numbers; see ``sizes.Owner``."""
        key = (function, *map(_identity, operands))
        if key in self._guarded:
            return
        self._guarded.add(key)
        items = tuple(self._writer.operand(item) for item in operands)
        for item in operands:
            self._writer.keep(item)
        if any(isinstance(item, fx.Node) for item in items):
            data = any(isinstance(item, SymbolicInt | SymbolicFloat) and item.expression.data for item in operands)
            node = self._writer.add_after(function, items)
            self._guard(node, value, "a decision on a value computed from tensors", data)

    def consumed(self, number: Number) -> None:
        """Python took the plain value of a number; see ``sizes.Owner``."""
        node = self._writer.number(number)
        draw = self._writer.drawn.get(node) if isinstance(number, SymbolicFloat) else None
        if draw:  # a guard on it would never hold again
            self._modules.hazard(f"a plain float of what {draw} draws", hard=True, draws=True)
            return
        self._guard(node, plain_number(number), "a plain number computed from tensors", number.expression.data)


def is_check(node: fx.Node) -> bool:
    """Whether a node is a guard, or a comparison that guards alone use."""
    return node.target is ops.guard or (bool(node.users) and all(user.target is ops.guard for user in node.users))


def _identity(item: Any) -> Any:
    """Return what tells two operands of a comparison apart."""
    if isinstance(item, SymbolicInt | SymbolicFloat):
        expression = item.expression
        if expression.function is None:
            value, *read = expression.operands
            return value.base, value.path, *read
        return expression.function, tuple(map(_identity, expression.operands))
    return type(item), item
