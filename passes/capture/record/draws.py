"""Writes calls that give another value each time into the graph, and follows what Python computes from what they drew."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from dnifx.passes.capture.record import functions
from dnifx.passes.capture.record.arrays import FollowedArray, bare
from dnifx.passes.capture.record.drawing import DrawingFunction, drawing_function
from dnifx.passes.capture.record.guards import Guards
from dnifx.passes.capture.record.hazards import model_line
from dnifx.passes.capture.record.node_values import NodeValue, Path
from dnifx.passes.capture.record.open_modules import OpenModules
from dnifx.passes.capture.record.plan import Plan
from dnifx.passes.capture.record.sizes import Number, Owner, plain, symbolic
from dnifx.passes.capture.record.writer import Writer
from dnifx.runtime.emitted import ops


class RunningRecorder(Owner, Protocol):
    """The recorder, as far as it matters here."""

    read_inside: dict[str, None]

    def paused(self) -> AbstractContextManager[None]:
        """Record nothing within the block."""

    def opaque_node(
        self, run: Callable[..., Any], target: Any, head: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, fx.Node]:
        """Run a call and write it as one node."""


class Draws:
    """Is told of the functions that draw, and of the arrays that they gave; see ``anew.AnewObserver``, ``arrays.ArrayObserver``.

    Args:
        recorder: The recorder.
        writer: Its graph.
        modules: The modules that run.
        guards: The guards on what Python sees.
        plan: Says which functions of the model's code are seen through.

    Attributes:
        functions: The functions of the model's code that draw, by their code: another run records each as one call.
        failed: The codes of such functions that cannot be one call.
        formatted: Whether Python made a text of the values of a tensor, since something was last said.
    """

    def __init__(
        self, recorder: RunningRecorder, writer: Writer, modules: OpenModules, guards: Guards, plan: Plan
    ) -> None:
        self._recorder, self._writer, self._modules, self._guards = recorder, writer, modules, guards
        self.formatted = False
        self.functions: dict[CodeType, DrawingFunction] = {}
        self.failed: set[CodeType] = set()
        self._plan = plan

    @property
    def active(self) -> bool:
        """Whether the recorder records."""
        return self._recorder.active

    def acted(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call that acts by its effect; refuse a text that was made of values, which other calls compute anew."""
        if self.formatted and any(isinstance(item, str) for item in args):
            self._modules.hazard(
                f"a text made of a tensor's values, which {name or 'a logger'} gets", hard=True, effect=True
            )
        self.formatted = False
        return self._called(function, name, args, kwargs)

    def _argument(self, item: Any) -> Any:
        """Return a value in the form of a node's argument; sizes stay of their own class, which shows in a text."""
        sizes = self._writer.argument(item)
        return self._writer.add("call_function", torch.Size, (sizes,)) if isinstance(item, torch.Size) else sizes

    def took_unseen(self, name: str) -> None:
        """A function is called whose result, or effect on a list, nothing follows."""
        self._modules.note_draws(model_line)
        self._look_for_function()
        self._modules.hazard(f"{name}(), whose result no graph follows", hard=True, draws=True)

    def indexed(self, name: str, args: tuple[Any, ...]) -> None:
        """Where a tensor is indexed, torch looked at the items of arrays among the indices."""
        given = args[1:] if name in ("__getitem__", "__setitem__") else ()
        for item in given[0] if given and type(given[0]) is tuple else given:
            known = self._writer.find(item) if isinstance(item, FollowedArray) else None
            if known is not None:
                self._guards.forget(known.base, item.size)

    def is_followed(self, item: Any) -> bool:
        """Whether an array is a value of the graph."""
        return isinstance(item, FollowedArray) and self._writer.find(item) is not None

    def consumed(self, number: Number) -> None:
        """Python took the plain value of a number."""
        self._guards.consumed(number)

    def called_anew(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call that gives another value each time; ``name`` is the function's dotted name, or empty."""
        if not name.startswith("time."):
            self._look_for_function()
        return self._called(function, name, args, kwargs)

    def _called(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._modules.note_draws(model_line)
        items, named = tuple(map(self._argument, args)), self._writer.argument(dict(kwargs))
        with self._recorder.paused():
            result = function(*plain(bare(args)), **{key: plain(bare(value)) for key, value in kwargs.items()})
        self._modules.forget_draws()
        label = name.rpartition(".")[2] or getattr(function, "__name__", "draw")
        target = name or self._writer.constant(function)
        return self.followed(
            result, self._writer.add("call_function", ops.call_anew, (target, *items), named, label), ()
        )

    def _look_for_function(self) -> None:
        """Note the function of the model's code that draws here, if it may be recorded as one call."""
        found = drawing_function()
        if found is not None and found.code not in self._plan.seen_through:
            self.functions[found.code] = found

    def called_drawing(
        self, function: Callable[..., Any], code: CodeType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call of a function that draws; one that reads parameters, or gives an object, has to be looked into."""
        self._modules.note_draws(model_line)
        result, node = self._recorder.opaque_node(function, ops.call_anew, (function,), bare(args), kwargs)
        self._modules.forget_draws()
        if self._recorder.read_inside or not can_be_followed(result):
            self.failed.add(code)
            return result
        return self.followed(result, node, ())

    def repeated(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write the call of an operation that gives nothing and acts by its effect."""
        items, named = self._writer.argument(tuple(args)), self._writer.argument(dict(kwargs))
        target = self._writer.constant(function)
        self._writer.add("call_function", ops.call_anew, (target, *items), named, name=functions.name_of(function))

    def called_array(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record what NumPy computes from arrays."""
        if call is np.ndarray.__getitem__ and isinstance(args[1], int):  # torch looks so at an array that is an index
            known = self._writer.find(args[0])
            if known is not None:
                item = bare(args[0])[args[1]]
                return self.followed(item, known.base, (*known.path, ("item", int(args[1]))))
        items, named = self._writer.argument(tuple(args)), self._writer.argument(dict(kwargs))
        with self._recorder.paused():
            result = call(*plain(bare(args)), **{key: plain(bare(value)) for key, value in kwargs.items()})
        node = self._writer.add(
            "call_function", ops.call, (self._writer.constant(call), *items), named, name=call.__name__.strip("_")
        )
        return self.followed(result, node, ())

    def wrote_array(self, array: FollowedArray, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Record a write: from here on the array is another value of the graph."""
        items = self._writer.argument(tuple(args))
        node = self._writer.add("call_function", ops.call, (self._writer.constant(call), *items), name="write")
        self._writer.remember(array, NodeValue(node))

    def followed(self, result: Any, node: fx.Node, path: Path) -> Any:
        """Return what Python sees of a result: numbers and arrays that the graph computes anew in each call.

        Args:
            result: The result, or a part of it.
            node: The node that computes the whole.
            path: The steps to the part.
        """
        if isinstance(result, Tensor):
            self._writer.bind(result, node, path)
            return result
        if isinstance(result, bool | np.bool_):
            self._guards.drawn(self._writer.node_of(NodeValue(node, path)), bool(result))
            return result
        if isinstance(result, int | float | np.integer | np.floating):
            number = symbolic(
                result.item() if isinstance(result, np.generic) else result,
                self._recorder,
                None,
                (NodeValue(node, path), None, ""),
                True,
            )
            self._guards.watch(number)
            return number
        if isinstance(result, np.ndarray):
            array = FollowedArray.of(result, self)
            self._writer.remember(array, NodeValue(node, path))
            return array
        if type(result) in (list, tuple):
            parts = [self.followed(part, node, (*path, ("item", index))) for index, part in enumerate(result)]
            return type(result)(parts)
        if result is None or isinstance(result, torch.Generator):  # of a function that seeds
            return result
        self._modules.hazard(f"what {self._writer.drawn[node]} gives, {type(result).__name__}", hard=True, draws=True)
        return result


def can_be_followed(result: Any) -> bool:
    """Whether a result is made of tensors, arrays and numbers."""
    if type(result) in (list, tuple):
        return all(map(can_be_followed, result))
    return isinstance(result, Tensor | np.ndarray | int | float | np.bool_ | np.integer | np.floating)
