"""Functions of the model's code that draw: each is recorded as one call, so that its Python runs in every call."""

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from torch import nn

from dnifx.passes.capture.record.anew import Patch
from dnifx.passes.capture.record.hazards import model_frames


class DrawingFunction(NamedTuple):
    """A function that draws, and where callers find it.

    Attributes:
        holder: The module or class that holds it.
        name: Its name there.
        code: Its code.
    """

    holder: Any
    name: str
    code: types.CodeType


class FunctionObserver(Protocol):
    """The recorder, as far as it matters here."""

    @property
    def active(self) -> bool:
        """Whether the recorder records."""

    def called_drawing(
        self, function: Callable[..., Any], code: types.CodeType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function is called that draws."""


def drawing_function() -> DrawingFunction | None:
    """Return the innermost function that is running, unless that is a forward, or nothing shows where callers find it."""
    frames = [frame for frame in model_frames() if not frame.f_code.co_name.startswith("<")]
    for frame, caller in pairwise(frames):
        first = frame.f_code.co_varnames[:1] if frame.f_code.co_argcount else ()
        owner = frame.f_locals.get(first[0]) if first else None
        if frame.f_code.co_name == "forward" and isinstance(owner, nn.Module):
            return None
        return next(places(frame, owner, caller), None)
    return None


def places(frame: types.FrameType, owner: Any, caller: types.FrameType) -> Iterator[DrawingFunction]:
    """Yield where a caller may find a function: in the class that it is written in, in the caller's module, in others."""
    code = frame.f_code
    home: Any = sys.modules.get(str(frame.f_globals.get("__name__")))
    for part in code.co_qualname.split(".")[:-1]:
        home = vars(home).get(part) if isinstance(home, types.ModuleType | type) else None
    own = sys.modules.get(str(caller.f_globals.get("__name__")))
    holders: list[Any] = [own, *(value for value in caller.f_globals.values() if isinstance(value, types.ModuleType))]
    holders += [*type(owner).__mro__, home if isinstance(home, type) else None]
    for holder in holders:
        held = getattr(holder, "__dict__", {})
        names = held if holder is own else [code.co_name]
        for name in names:
            if getattr(raw(held.get(name)), "__code__", None) is code:
                yield DrawingFunction(holder, name, code)


def raw(value: Any) -> Any:
    """Return the function in a static or class method, or under decorators; anything else unchanged."""
    value = value.__func__ if isinstance(value, staticmethod) else value
    return inspect.unwrap(value) if isinstance(value, types.FunctionType) else value


def shown(observer: FunctionObserver, each: DrawingFunction) -> Patch:
    """Return a stand-in for a function that shows the observer each call as one."""
    held = vars(each.holder)[each.name]
    function = held.__func__ if isinstance(held, staticmethod) else held
    is_method = isinstance(each.holder, type) and held is function

    def call(*args: Any, **kwargs: Any) -> Any:
        if not observer.active:
            return function(*args, **kwargs)
        if not is_method:
            return observer.called_drawing(function, each.code, args, kwargs)
        return observer.called_drawing(types.MethodType(function, args[0]), each.code, args[1:], kwargs)

    return each.holder, each.name, staticmethod(call) if isinstance(held, staticmethod) else call
