"""Watches what Python reads from the attributes of modules and of what they hold, and what it writes there."""

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dnifx.passes.capture.model_state import CONTAINERS, PLAIN, Missing
from dnifx.passes.capture.record.anew import GENERATORS
from dnifx.passes.capture.record.hazards import is_models

_OWN = frozenset(dir(nn.Module()))
"""What every module has: methods, registries and hooks of torch, and the mode, which is part of the input kind by itself."""


class AttributeObserver(Protocol):
    """The recorder, as far as it matters here."""

    def read_attribute(self, holder: Any, name: str, value: Any) -> Any:
        """Python reads an attribute; what is returned takes its place."""

    def read_object(self, holder: Any, name: str, value: Any) -> None:
        """Python reads an attribute that is an object, whose own attributes it may read next."""

    def wrote_attribute(self, holder: Any, name: str) -> None:
        """Python assigns an attribute."""

    def left_alone(self, holder: Any) -> None:
        """What Python assigns to an object from here on cannot be seen; all that it holds was told."""


class AttributeWatch:
    """Tells an observer of the attributes that Python reads and writes: of modules, and of the objects that modules hold.

    The classes of the objects get other ``__getattribute__`` and ``__setattr__`` as long as the watch lasts.

    Args:
        observer: What is told.
    """

    def __init__(self, observer: AttributeObserver) -> None:
        self._observer = observer
        self._watched: dict[type, bool] = {}
        self._told: dict[int, Any] = {}
        self._undo = ExitStack()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch modules within the block, and what they hold as soon as it is read."""
        with self._undo:
            self.look_into(nn.Module)
            self._watch_registries()
            yield

    def _watch_registries(self) -> None:
        """Watch buffers that are registered, and what is looked for on modules and not there."""
        find: Callable[..., Any] = nn.Module.__getattr__
        register: Callable[..., None] = nn.Module.register_buffer
        observer = self._observer

        def watched_find(module: nn.Module, name: str) -> Any:
            try:
                return find(module, name)
            except AttributeError:
                if name not in _OWN and name[:2] != "__":
                    observer.read_attribute(module, name, Missing)
                raise

        def watched_register(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
            observer.wrote_attribute(module, name)
            register(module, name, *args, **kwargs)

        for name, before, method in (
            ("__getattr__", find, watched_find),
            ("register_buffer", register, watched_register),
        ):
            self._undo.callback(setattr, nn.Module, name, before)
            setattr(nn.Module, name, method)

    def look_at(self, value: Any) -> None:
        """Watch an object from here on; tell at once what one holds whose class cannot be watched, such as a SimpleNamespace."""
        if self.look_into(type(value)) or id(value) in self._told:
            return
        self._told[id(value)] = value
        for name, part in [*getattr(value, "__dict__", {}).items()]:
            seen = self._seen(value, name, part)
            if seen is not part:
                vars(value)[name] = seen
        self._observer.left_alone(value)

    def look_into(self, kind: type) -> bool:
        """Watch the attributes of a class's objects from here on; return whether that can be done."""
        if kind in self._watched:
            return self._watched[kind]
        self._watched[kind] = True
        read: Callable[..., Any] = kind.__getattribute__
        write: Callable[..., None] = kind.__setattr__
        observer, finds_more = self._observer, hasattr(kind, "__getattr__")

        def watched_read(holder: Any, name: str) -> Any:
            try:
                value = read(holder, name)
            except AttributeError:
                if not finds_more and name[:2] != "__":
                    observer.read_attribute(holder, name, Missing)
                raise
            if name == "__dict__":
                self._read_whole(holder, value, sys._getframe(1).f_code)
            return self._seen(holder, name, value) if name not in _OWN and name[:2] != "__" else value

        def watched_write(holder: Any, name: str, value: Any) -> None:
            if name not in _OWN:
                observer.wrote_attribute(holder, name)
            write(holder, name, value)

        for name, method in (("__getattribute__", watched_read), ("__setattr__", watched_write)):
            own = name in kind.__dict__
            before = kind.__dict__.get(name)
            try:
                setattr(kind, name, method)
            except TypeError:  # a class of C code
                self._watched[kind] = False
                return False
            self._undo.callback(setattr, kind, name, before) if own else self._undo.callback(delattr, kind, name)
        return True

    def _read_whole(self, holder: Any, content: dict[str, Any], reader: types.CodeType) -> None:
        """Tell of all attributes where the model's own code takes them as one dictionary."""
        if is_models(reader.co_filename, reader.co_firstlineno):
            for name, value in [*content.items()]:
                if name not in _OWN:
                    self._seen(holder, name, value)

    def _seen(self, holder: Any, name: str, value: Any) -> Any:
        if isinstance(value, nn.Module | type | property) or is_computed(holder, name):
            return value
        if inspect.isroutine(value) and not is_assigned(holder, name):
            return value
        if is_object(value):
            self._observer.read_object(holder, name, value)
            self.look_at(value)
            return value
        return self._observer.read_attribute(holder, name, value)


def is_computed(holder: Any, name: str) -> bool:
    """Whether an attribute is a property or another descriptor, which reads other attributes."""
    found = inspect.getattr_static(type(holder), name, None)
    is_slot = isinstance(found, types.MemberDescriptorType)
    return not is_slot and hasattr(type(found), "__get__") and hasattr(type(found), "__set__")


def is_assigned(holder: Any, name: str) -> bool:
    """Whether an attribute is the object's own, not one of its class."""
    return name in getattr(holder, "__dict__", ())


def is_object(value: Any) -> bool:
    """Whether a value is an object of somebody's class, whose attributes are read one by one."""
    if isinstance(value, (Tensor, torch.Generator, *GENERATORS, *CONTAINERS, *PLAIN)):
        return False
    of_python = type(value).__module__ in ("builtins", "types") and not isinstance(value, types.SimpleNamespace)
    has_attributes = hasattr(value, "__dict__") or any("__slots__" in vars(kind) for kind in type(value).__mro__)
    return has_attributes and not of_python and type(value).__module__ != "numpy"
