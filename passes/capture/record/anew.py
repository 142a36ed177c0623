"""Functions that give another value in each call, or act by it: random numbers of Python and NumPy, clocks, print, logging."""

import builtins
import logging
import os
import random
import sys
import time
import types
import uuid
import warnings
from collections.abc import Callable, Iterator
from io import IOBase
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from dnifx.passes.capture.model_state import Read
from dnifx.passes.capture.record.hazards import UnsafeForward, model_line
from dnifx.passes.capture.record.sizes import Number

_NO_DRAW = frozenset({"seed", "getstate", "setstate", "get_state", "set_state", "choice", "shuffle"})
_SEEDS = ((torch, "manual_seed"), (torch.random, "manual_seed"), (random, "seed"), (np.random, "seed"))
_UNSEEN = (
    (os, "urandom"),
    (uuid, "uuid1"),
    (uuid, "uuid4"),
    (np.random, "default_rng"),
    (random, "shuffle"),
    (np.random, "shuffle"),
)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_CLOCKS = "time time_ns perf_counter perf_counter_ns monotonic monotonic_ns process_time process_time_ns".split()

Patch = tuple[Any, str, Any]


class AnewObserver(Protocol):
    """The recorder, as far as it matters here."""

    @property
    def active(self) -> bool:
        """Whether the recorder records."""

    def called_anew(
        self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function is called that gives another value in each call; ``name`` is its dotted name, if it has one."""

    def acted(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function is called that says something: print, a logger."""

    def took_unseen(self, name: str) -> None:
        """A function is called whose result, or effect on a list, nothing follows."""

    def is_followed(self, item: Any) -> bool:
        """Whether an array is a value of the graph."""

    def consumed(self, number: Number) -> None:
        """Python takes the plain value of a symbolic number."""


def functions() -> Iterator[tuple[Any, str, str, Callable[..., Any]]]:
    """Yield the functions: the module that holds each, its name there, its dotted name, and the function."""
    for module, holder in ((random, random.random), (np.random, np.random.random)):
        owner = getattr(holder, "__self__", None)
        for name, value in vars(module).items():
            if getattr(value, "__self__", None) is owner and name not in _NO_DRAW:
                yield module, name, f"{module.__name__}.{name}", value
    yield np.random, "choice", "numpy.random.choice", np.random.choice
    for module, name in _SEEDS:
        yield module, name, f"{module.__name__}.{name}", getattr(module, name)


def calls_anew(observer: AnewObserver, model: nn.Module) -> Iterator[Patch]:
    """Yield stand-ins for the functions, in their own modules and where the modules of the model's classes imported them."""
    standins: dict[int, Any] = {}
    for module, name, dotted, function in functions():
        standins[id(function)] = standin(observer, dotted, function)
        yield module, name, standins[id(function)]
    for name in _CLOCKS:
        standins[id(getattr(time, name))] = clock(observer, f"time.{name}", getattr(time, name))
        yield time, name, standins[id(getattr(time, name))]
    chosen = standins[id(random.choice)] = choosing(observer)
    yield random, "choice", chosen
    for module, name in _UNSEEN:
        standins[id(getattr(module, name))] = unseen(observer, f"{module.__name__}.{name}", getattr(module, name))
        yield module, name, standins[id(getattr(module, name))]
    yield torch, "from_numpy", converting(observer)
    for module, name in ((builtins, "print"), (warnings, "warn")):
        standins[id(getattr(module, name))] = saying(observer, f"{module.__name__}.{name}", getattr(module, name))
        yield module, name, standins[id(getattr(module, name))]
    yield logging.Logger, "_log", logging_to(observer)
    places = dict.fromkeys(
        base.__module__ for kind in dict.fromkeys(map(type, model.modules())) for base in kind.__mro__
    )
    for place in places:
        held = vars(sys.modules[place]) if place in sys.modules and place.partition(".")[0] not in _OWN else {}
        for name, value in held.items():
            if id(value) in standins:
                yield sys.modules[place], name, standins[id(value)]


_OWN = ("torch", "builtins", "typing", "abc", "collections")


def standin(observer: AnewObserver, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that shows the observer each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return observer.called_anew(function, name, args, kwargs) if observer.active else function(*args, **kwargs)

    return call


def clock(observer: AnewObserver, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that shows the observer each call, but for those by Python's own modules."""
    shown = standin(observer, name, function)

    def call(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0]
        return function(*args, **kwargs) if caller in sys.stdlib_module_names else shown(*args, **kwargs)

    return call


def saying(observer: AnewObserver, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that shows the observer what is said."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return observer.acted(function, name, args, kwargs) if observer.active else function(*args, **kwargs)

    return call


def logging_to(observer: AnewObserver) -> Callable[..., Any]:
    """Return a stand-in for the method by which a logger logs. What is logged once in a process is no part of a call."""
    log = logging.Logger._log

    def call(logger: logging.Logger, *args: Any, **kwargs: Any) -> Any:
        frame: types.FrameType | None = sys._getframe(1)
        names: list[str] = []
        while frame is not None and len(names) < 5:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        if not observer.active or any(name.endswith("_once") for name in names):
            return log(logger, *args, **kwargs)
        return observer.acted(types.MethodType(log, logger), "", args, kwargs)

    return call


def unseen(observer: AnewObserver, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that tells the observer that what it gives cannot be followed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if observer.active and not (name == "numpy.random.default_rng" and (args or kwargs)):
            observer.took_unseen(name)
        return function(*args, **kwargs)

    return call


def converting(observer: AnewObserver) -> Callable[..., Any]:
    """Return a stand-in for ``torch.from_numpy``, which shows itself to no function mode."""
    convert = torch.from_numpy

    def call(array: Any) -> Any:
        return torch.as_tensor(array) if observer.active and observer.is_followed(array) else convert(array)

    return call


class FollowedGenerator:
    """Stands for a generator that the model holds: the recorder sees what its methods draw.

    Args:
        generator: The generator.
        observer: The recorder.
    """

    def __init__(self, generator: Any, observer: AnewObserver) -> None:
        self._generator, self._observer = generator, observer

    def __getattr__(self, name: str) -> Any:
        """Return a method that shows the observer each call."""
        value = getattr(self._generator, name)
        if name == "shuffle":
            return unseen(self._observer, f"{type(self._generator).__name__}.shuffle", value)
        return standin(self._observer, "", value) if callable(value) else value


def choosing(observer: AnewObserver) -> Callable[..., Any]:
    """Return a stand-in for ``random.choice``: it draws the place of the item, which takes the same random bits."""
    choice, randrange = random.choice, random.randrange

    def call(seq: Any) -> Any:
        if not observer.active or not len(seq):
            return choice(seq)
        place = observer.called_anew(randrange, "random.randrange", (len(seq),), {})
        observer.consumed(place)
        return seq[place]

    return call


class Known(Protocol):
    """The objects that the model's attributes hold, as far as they matter here."""

    def knows(self, holder: Any) -> bool:
        """Whether an object is one of the model's."""

    def at(self, holder: Any, name: str) -> Read:
        """Return an attribute of a known object."""


def refuse_iterator(known: Known, holder: Any, name: str, value: Any) -> None:
    """Raise UnsafeForward where Python reads an iterator, before it takes an item: nobody could put the item back."""
    if isinstance(value, Iterator) and not isinstance(value, IOBase) and known.knows(holder):
        raise UnsafeForward(
            f"{known.at(holder, name).path} is an iterator ({type(value).__name__}): a graph would hold one item fixed, and a capture "
            f"takes items away ({model_line()})",
            "Give forward the item as an argument, or hold a list and the number of calls",
        )
