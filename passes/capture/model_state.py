"""What a forward method reads from the model's attributes and leaves there."""

import copy
import enum
import inspect
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from dnifx.passes.capture.record.sizes import plain_number
from dnifx.passes.capture.record.structure import EmptyContainer, SameTensor, walk

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
"""Values that say all there is to say of them."""

MOST_BYTES = 2**16
"""Up to how many bytes the content of an array is part of the input kind; a larger one only counts as the object that it is."""

CONTAINERS = (list, tuple, dict, set, frozenset, deque)


class Outside:
    """What holds something outside of the model; copies of a net share it.

    See ``passes.capture.record.outside``.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself."""
        return self


@dataclass(frozen=True)
class Read:
    """An attribute that the forward method reads: of a module, of an object that a module holds, or outside of the model.

    Attributes:
        holder: The module or object; an ``Outside``, a class or a function for what is outside of the model.
        name: The attribute's name.
        path: The attribute as people write it: ``self.gate.alpha``, and ``settings:RATE`` outside of the model.
        seen: Its value when the model was captured, where it is part of the input kind.
    """

    holder: Any
    name: str
    path: str
    seen: Any = None

    @property
    def value(self) -> Any:
        """What the attribute is now; ``Missing`` where it is gone."""
        return getattr(self.holder, self.name, Missing)

    @property
    def key(self) -> Hashable:
        """What of its value is part of the input kind."""
        return comparable(self.value, self.seen)

    @property
    def moved(self) -> bool:
        """Whether it holds another number or other tensors than when the model was captured."""
        value = self.value
        return can_be_input(value) and comparable(value, self.seen) != comparable(self.seen, self.seen)

    @property
    def is_outside(self) -> bool:
        """Whether it is outside of the model."""
        return isinstance(self.holder, Outside | type | FunctionType)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Read":
        """Return a copy; what is outside of the model is not copied."""
        return self if self.is_outside else Read(*(copy.deepcopy(part, memo) for part in vars(self).values()))

    def __reduce__(self) -> Any:
        """Leave behind what was seen outside of the model: another process has a world of its own, and captures anew."""
        return Read, (self.holder, self.name, self.path, Lost() if self.is_outside else self.seen)


class Missing:
    """Stands for the value of an attribute that is not there."""


class Lost:
    """Stands for a value that another process saw."""


def held_at(holder: Any, name: str) -> Any:
    """Return what an attribute holds, without calling a property of a module; ``Missing`` if it is not there."""
    find = inspect.getattr_static if isinstance(holder, nn.Module) else getattr
    return find(holder, name, Missing)


@dataclass(frozen=True)
class Write:
    """An attribute that the forward method leaves on a module or object.

    Attributes:
        holder: The module or object.
        name: The attribute's name.
        path: The attribute as people write it.
        build: Builds its value from the graph's outputs for it.
        count: Number of these outputs.
        content: Whether a container stays and gets another content; else the attribute is assigned.
        persistent: For a buffer, whether the state dict holds it; None for any other attribute.
        adds: Whether the content is added to what the container holds.
    """

    holder: Any
    name: str
    path: str
    build: Callable[[Sequence[Any]], Any]
    count: int
    content: bool = False
    persistent: bool | None = None
    adds: bool = False

    def leave(self, values: Sequence[Any]) -> None:
        """Leave its value on the model."""
        made = self.build(values)
        if self.persistent is not None:
            self.holder.register_buffer(self.name, made, self.persistent)
            return
        if not self.content:
            setattr(self.holder, self.name, made)
            return
        container = getattr(self.holder, self.name)
        if not self.adds:
            container.clear()
        container.update(made) if isinstance(container, dict | set) else container.extend(made)


def fixed(leaf: Any) -> Hashable:
    """Return what identifies an argument that is not a tensor."""
    leaf = plain_number(leaf)
    if isinstance(leaf, SameTensor | EmptyContainer):
        return leaf
    if isinstance(leaf, float | slice):
        return repr(leaf)
    if isinstance(leaf, bool | int | complex | str | bytes | type(None) | torch.dtype | torch.device | Enum):
        return type(leaf).__name__, leaf
    if isinstance(leaf, np.ndarray):
        return leaf.shape, str(leaf.dtype), leaf.tobytes()
    return getattr(leaf, "__qualname__", type(leaf).__qualname__)


def frozen(value: Any) -> Any:
    """Return a container with containers of its own, which stay as they are when the model changes its own."""
    if isinstance(value, dict):
        return frozen_dict(value)
    if isinstance(value, deque):
        return deque(map(frozen, value), value.maxlen)
    return type(value)(map(frozen, value)) if type(value) in (list, tuple, set, frozenset) else value


def frozen_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict with a copy of what it holds, of its own class where that lets itself be copied.

    A class may refuse every change, as configurations do, so its own methods are not asked.
    """
    held = {key: frozen(part) for key, part in dict.items(value)}
    try:
        made: dict[Any, Any] = copy.copy(value)
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return held
    if made is value or dict.keys(made) != held.keys():
        return held
    for key, part in held.items():
        dict.__setitem__(made, key, part)
    return made


def comparable(value: Any, seen: Any) -> Hashable:
    """Return what tells values of an attribute apart.

    That is its type and value, for a container what it holds, and for a tensor whether it is the one that was seen.
    """
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, np.ndarray) and value.nbytes <= MOST_BYTES:
        return fixed(value)
    if not isinstance(value, (Tensor, *CONTAINERS)):
        return value is seen
    before = {path: leaf for path, leaf in walk(seen, whole=True) if isinstance(leaf, Tensor)}
    return tuple(
        (path, leaf is before.get(path) or id(leaf)) if isinstance(leaf, Tensor) else (path, fixed(leaf))
        for path, leaf in walk(value, whole=True)
    )


def can_be_input(value: Any) -> bool:
    """Whether a graph can take a value as inputs: a number, or something that holds tensors."""
    if isinstance(value, PLAIN):
        return type(value) in (int, float)
    return any(isinstance(leaf, Tensor) for _, leaf in walk(value))
