"""NumPy arrays that a recorded call drew: what Python computes from them is recorded too."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from dnifx.passes.capture.record.sizes import Number, plain_number
from dnifx.runtime.emitted import ops

_METHODS = (
    "astype reshape copy squeeze ravel flatten transpose swapaxes repeat take clip round cumsum argsort sum mean std var min max "
    "prod any all argmax argmin item tolist __getitem__ __bool__"
).split()
"""Methods that compute something from an array and are not NumPy's universal functions."""


class ArrayObserver(Protocol):
    """The recorder, as far as it matters here."""

    @property
    def active(self) -> bool:
        """Whether the recorder records."""

    def called_array(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function or method is called with arrays that the recorder follows."""

    def consumed(self, number: Number) -> None:
        """Python takes the plain value of a symbolic number."""

    def wrote_array(self, array: "FollowedArray", call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """An array has been written in place, by a function that returns its new value."""


class FollowedArray(np.ndarray):
    """An array that tells the recorder what is computed from it."""

    observer: ArrayObserver | None

    @classmethod
    def of(cls, array: Any, observer: ArrayObserver) -> "FollowedArray":
        """Return an array on the same memory that an observer follows."""
        found = np.asarray(array).view(cls)
        found.observer = observer
        return found

    def __array_finalize__(self, source: Any) -> None:
        """Views and copies that NumPy makes by itself are not followed."""
        self.observer = None

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        """Record a universal function."""
        call = getattr(ufunc, method)
        observer = observer_of(inputs)
        if observer is None or out is not None:
            given = {} if out is None else {"out": tuple(map(bare, out))}
            result = call(*map(bare, inputs), **given, **kwargs)
            if observer is not None and len(out) == 1 and isinstance(out[0], FollowedArray):
                observer.wrote_array(out[0], call, inputs)
            return out[0] if out is not None and len(out) == 1 else result
        return observer.called_array(call, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Record a function of NumPy."""
        observer = observer_of((*args, *kwargs.values()))
        if observer is None:
            return func(*bare(args), **{name: bare(value) for name, value in kwargs.items()})
        return observer.called_array(func, args, kwargs)


def bare(value: Any) -> Any:
    """Return what is given with plain arrays in place of followed ones."""
    if isinstance(value, FollowedArray):
        return value.view(np.ndarray)
    return type(value)(map(bare, value)) if type(value) in (list, tuple) else value


def observer_of(values: Any) -> ArrayObserver | None:
    """Return the active observer of the first array that has one."""
    for value in values:
        found = observer_of(value) if type(value) in (list, tuple) else getattr(value, "observer", None)
        if isinstance(value, FollowedArray | list | tuple) and found is not None and found.active:
            return found
    return None


def _recorded(name: str) -> Callable[..., Any]:
    own = getattr(np.ndarray, name)

    def method(self: FollowedArray, *args: Any, **kwargs: Any) -> Any:
        if self.observer is None or not self.observer.active:
            return own(bare(self), *bare(args), **kwargs)
        return self.observer.called_array(own, (self, *args), kwargs)

    return method


def _converted(name: str) -> Callable[..., Any]:
    recorded = _recorded(name)

    def method(self: FollowedArray) -> Any:
        number = recorded(self)
        value = plain_number(number)
        if value is not number and self.observer is not None:
            self.observer.consumed(number)
        return value

    return method


def _set_item(self: FollowedArray, index: Any, value: Any) -> None:
    np.ndarray.__setitem__(bare(self), bare(index), bare(value))
    if self.observer is not None and self.observer.active:
        self.observer.wrote_array(self, ops.set_item, (self, index, value))


FollowedArray.__setitem__ = _set_item  # type: ignore[assignment]


def _items(self: FollowedArray) -> Iterator[Any]:
    return (self[place] for place in range(len(self)))


FollowedArray.__iter__ = _items  # type: ignore[assignment]
for _name in ("__int__", "__float__", "__index__"):
    setattr(FollowedArray, _name, _converted(_name))
for _name in _METHODS:
    setattr(FollowedArray, _name, _recorded(_name))
