"""Writes a call into the graph, in a form that generated code can make and in the regions around it."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dnifx.passes.capture.record import functions
from dnifx.passes.capture.record.writer import Writer
from dnifx.runtime.emitted import ops
from dnifx.runtime.emitted.ops import Autocast

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def write_call(
    writer: Writer, regions: Sequence[Autocast], function: Any, name: str, field: str, arguments: Arguments
) -> fx.Node:
    """Write the node of a torch function's call.

    Args:
        writer: The graph.
        regions: The autocast regions around the call.
        function: The function.
        name: Its name.
        field: The property that it reads or sets, or nothing.
        arguments: Its arguments, in the form of a node's arguments.
    """
    args, kwargs = arguments
    op, target, label = "call_function", function, name.strip("_")
    if field and name == "__get__":
        target, arguments, label = getattr, ((args[0], field), {}), field
    elif field:
        target, arguments, label = ops.set_attribute, ((args[0], field, args[1]), {}), f"set_{field}"
    elif name == "__getitem__":
        target = operator.getitem
    elif name == "__setitem__":
        target, label = ops.set_item, "set_item"
    elif functions.is_method(function):
        op, target = "call_method", name
        if "self" in kwargs:
            arguments = (kwargs["self"], *args), {key: value for key, value in kwargs.items() if key != "self"}
    return in_region(writer, regions, op, target, arguments, label)


def in_region(
    writer: Writer, regions: Sequence[Autocast], op: str, target: Any, arguments: Arguments, name: str
) -> fx.Node:
    """Write a call in the grad mode and the autocast region that the model has set around it."""
    args, kwargs = arguments
    grad = torch.is_grad_enabled()
    if grad and not regions:
        if op == "call_method":
            return writer.add(op, target, args, kwargs)
        if not functions.is_importable(target):
            target, args = ops.call, (writer.constant(target), *args)
        return writer.add(op, target, args, kwargs, name=name)
    own = op == "call_function" and getattr(target, "__module__", "") == ops.__name__
    dotted = f".{target}" if op == "call_method" else None if own else functions.dotted_name(target)
    reached = dotted or writer.constant(target)
    region = regions[-1] if regions else None
    return writer.add("call_function", ops.under, (grad, region, reached, *args), kwargs, name=name)
