"""What ``dnifx.decouple`` is given, checked before anything is done with it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dnifx.errors import CaptureError, InputError, LossError, OptionError


def check_request(model: Any, args: Any, kwargs: Any, loss: Any, every: Any, callback: Any) -> None:
    """Raise a DnifxError where an argument is not of its kind.

    Raises:
        CaptureError: The model is no module.
        InputError: The example inputs are no tuple and no mapping, or nothing can be differentiated here.
        LossError: The loss cannot be called with an output and a target.
        OptionError: ``every`` is no mapping, or ``callback`` cannot be called.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "dnifx.decouple is called under torch.inference_mode(), where nothing can be differentiated: call it outside, or under "
            "torch.no_grad()"
        )
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    held = [name for name, each in named if not is_lazy(each) and each.is_inference()]
    if held:
        raise CaptureError(
            f"the parameter {held[0]!r} was made under torch.inference_mode(), and cannot be trained: make the model outside, or put a "
            "clone in its place"
        )
    if not isinstance(model, nn.Module):
        hint = f"; make one first: {model.__name__}(...)" if inspect.isclass(model) else ""
        raise CaptureError(f"model= is {described(model)}; decouple takes an nn.Module{hint}")
    if not isinstance(args, Tensor | tuple | list):
        raise InputError(
            f"args= is {described(args)}; give the tuple of the model's positional inputs, args=(x,), or name them, kwargs={{'x': x}}"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(
            f"kwargs= is {described(kwargs)}; give a mapping from the names of the model's arguments, {{'x': x}}"
        )
    for name, each in loss.items() if isinstance(loss, Mapping) else [("", loss)] if loss is not None else []:
        check_loss(f"loss[{name!r}]" if name else "loss", each)
    if every is not None and not isinstance(every, Mapping):
        raise OptionError(
            f"every= is {described(every)}; give a mapping from module paths to numbers of windows, {{'slow': 4}}"
        )
    if callback is not None and not callable(callback):
        raise OptionError(f"callback= is {described(callback)}; give a callable that is told of each pass")


def check_loss(argument: str, loss: Any) -> None:
    """Raise LossError where a loss cannot be called with an output and a target."""
    if inspect.isclass(loss):
        raise LossError(f"{argument}= is the class {loss.__name__}; give an instance, {loss.__name__}(...)")
    if not callable(loss):
        raise LossError(
            f"{argument}= is {described(loss)}; give a callable (output, target) -> a scalar or one loss an example, such as "
            "torch.nn.functional.cross_entropy"
        )


def described(value: Any) -> str:
    """Return what a value is, in an error text."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    return "None" if value is None else type(value).__name__
