"""How a call is written into the graph: in the form in which generated code can make it, and in the regions around it."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dnifx.passes.capture.record import functions
from dnifx.passes.capture.record.frames import Autocast
from dnifx.passes.capture.record.writer import Writer
from dnifx.runtime.emitted import ops

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
        arguments: What stands for its arguments in the graph.
    """
    args, kwargs = arguments
    if field and name == "__get__":
        return in_region(writer, regions, "call_function", getattr, ((args[0], field), {}), field)
    if field:
        return in_region(
            writer, regions, "call_function", ops.set_attribute, ((args[0], field, args[1]), {}), f"set_{field}"
        )
    if name == "__getitem__":
        return in_region(writer, regions, "call_function", operator.getitem, arguments, "getitem")
    if name == "__setitem__":
        return in_region(writer, regions, "call_function", ops.set_item, arguments, "set_item")
    if functions.is_method(function):
        if "self" in kwargs:
            arguments = (kwargs["self"], *args), {key: value for key, value in kwargs.items() if key != "self"}
        return in_region(writer, regions, "call_method", name, arguments, name.strip("_"))
    return in_region(writer, regions, "call_function", function, arguments, name.strip("_"))


def in_region(
    writer: Writer, regions: Sequence[Autocast], op: str, target: Any, arguments: Arguments, name: str
) -> fx.Node:
    """Write a call in the grad mode and autocast region that the model has set around it."""
    args, kwargs = arguments
    grad = torch.is_grad_enabled()
    if grad and not regions:
        if op == "call_method":
            return writer.add(op, target, args, kwargs)
        if functions.is_importable(target):
            return writer.add(op, target, args, kwargs, name=name)
        return writer.add("call_function", ops.call, (writer.constant(target), *args), kwargs, name=name)
    own = op == "call_function" and getattr(target, "__module__", "") == ops.__name__
    dotted = f".{target}" if op == "call_method" else None if own else functions.dotted_name(target)
    reached = dotted or writer.constant(target)
    region = regions[-1] if regions else None
    return writer.add("call_function", ops.under, (grad, region, reached, *args), kwargs, name=name)
