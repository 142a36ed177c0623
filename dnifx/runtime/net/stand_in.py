"""The net in place of the model: it shows the model's signature, and has its attributes and methods beside its own."""

import inspect
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from dnifx.runtime.net import operators  # noqa: F401 - so that nets can be pickled
from dnifx.runtime.net.net import Net

REGISTRIES = ("_parameters", "_buffers", "_modules")


class StandIn(Net):
    """A net that answers for its model: what it does not have itself, it looks for there."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.show_signature()

    def show_signature(self) -> None:
        """Let ``inspect.signature(net.forward)`` be the model's, with what the net takes itself; loops choose columns by it."""
        own = type(self).forward
        shown = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
        shown.__kwdefaults__, shown.__doc__, shown.__module__ = own.__kwdefaults__, own.__doc__, own.__module__
        try:
            shown.__signature__ = signature_of(self)  # type: ignore[attr-defined]
        except (TypeError, ValueError):  # a forward that cannot be inspected
            return
        self.__dict__["forward"] = MethodType(shown, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.show_signature()

    def __getattr__(self, name: str) -> Any:
        """Look for an attribute among the net's own modules and tensors, then on the model."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            original = self.__dict__.get("original")
            if original is None or (name.startswith("__") and name.endswith("__")):
                raise
            try:
                return getattr(original, name)
            except AttributeError:
                raise AttributeError(
                    f"neither the net nor its model (net.original, {type(original).__name__}) has an attribute {name!r}"
                ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the net; one that only the model has is the model's, where its forward reads it."""
        original = self.__dict__.get("original")
        own = original is None or name in self.__dict__ or hasattr(type(self), name)
        named = any(name in self.__dict__.get(each, ()) for each in REGISTRIES)
        held = named or isinstance(value, Tensor | nn.Module)
        if own and named and not isinstance(value, Tensor | nn.Module):
            object.__setattr__(
                self, name, value
            )  # a child of the model bears the name of one of the net's own attributes
        elif own or held or not hasattr(original, name):
            super().__setattr__(name, value)
        else:
            setattr(original, name, value)

    def original_state_dict(self) -> dict[str, Any]:
        """Return the state of the model alone, without estimators; a plain copy of the model loads it."""
        state: dict[str, Any] = self.original.state_dict()
        return state


def signature_of(net: Net) -> inspect.Signature:
    """Return the signature of the model's forward, and after its arguments those that the net takes beside them."""
    program = net.program
    signature = inspect.signature(net.original.forward)
    taken = ["context"] * (program.context is not None) + ["reset"] * bool(net.recurrences)
    taken += ["target"] * any(each.needs_loss for each in program.interfaces)
    known = list(signature.parameters.values())
    ends = known[-1:] if known and known[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in taken
        if name not in signature.parameters
    ]
    # the first place is that of self, which inspect leaves out of a method
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    before = [each for each in known if each not in ends]
    return signature.replace(parameters=[own.replace(name=free_name(signature)), *before, *added, *ends])


def free_name(signature: inspect.Signature) -> str:
    """Return a name for the net itself that no argument of the model has."""
    name = "self"
    while name in signature.parameters:
        name += "_"
    return name
