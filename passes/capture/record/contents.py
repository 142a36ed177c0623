"""What Python objects hold: it is read, and put back in place, since others may hold the same objects."""

import random
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import Enum
from functools import lru_cache, partial
from operator import is_
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

Content = dict[Any, Any] | list[Any]
"""A copy of what an object holds, one level deep."""

ATOMS = frozenset(
    {
        *(bool, int, float, complex, str, bytes, type(None), type(...), range, type, BuiltinFunctionType, CodeType),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    }
)
"""Types whose values hold nothing that can change."""

_OPEN_ALTHOUGH_OF_PYTHON = frozenset({"argparse", "collections", "types"})
_OPEN_ALTHOUGH_OF_TORCH = ("torch.nn", "torch.optim", "torch.distributions")


class Access(NamedTuple):
    """How one kind of mutable object is read and refilled.

    Attributes:
        read: Returns what an object holds, as a dict or as another collection; it may be the object itself.
        refill: Gives an object a content that was read before.
        is_whole: Whether the content is a copy of its own, whose parts the object does not hold.
    """

    read: Callable[[Any], Any]
    refill: Callable[[Any, Any], None]
    is_whole: bool = False


class Held(NamedTuple):
    """What an object held.

    Attributes:
        item: The object.
        access: How it is read and refilled.
        content: A copy of what it held, one level deep.
    """

    item: Any
    access: Access
    content: Content

    def put_back(self) -> None:
        """Refill the object if it may hold other things by now."""
        item, access, content = self
        if access is ATTRIBUTES or not identical(content, access.read(item)):
            access.refill(item, content)

    def parts(self) -> Iterable[Any]:
        """Return the things that it held."""
        if self.access.is_whole:
            return ()
        return self.content.values() if isinstance(self.content, dict) else self.content


def held_by(item: Any) -> tuple[Held, ...]:
    """Return what an object holds; nothing if it counts as one thing."""
    kind: Any = type(item)  # a class is hashable, which mypy doubts
    return tuple([Held(item, access, _copy(access.read(item))) for access in accesses(kind)])


def _copy(live: Any) -> Content:
    return dict(live) if isinstance(live, dict) else list(live)


def identical(content: Content, live: Any) -> bool:
    """Whether an object that held a content still holds the very same things in the same order."""
    if isinstance(content, dict):
        return content.keys() == live.keys() and all(map(is_, content.values(), live.values()))
    return len(content) == len(live) and all(map(is_, content, live))


def _items(item: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict as a plain one, without the methods of its class."""
    order: type[dict[Any, Any]] = OrderedDict if isinstance(item, OrderedDict) else dict
    return item if type(item) is dict else {key: dict.__getitem__(item, key) for key in order.__iter__(item)}


def _refill_dict(item: dict[Any, Any], content: dict[Any, Any]) -> None:
    kind: type[dict[Any, Any]] = OrderedDict if isinstance(item, OrderedDict) else dict
    kind.clear(item)
    for key, value in content.items():
        kind.__setitem__(item, key, value)


def _refill_set(item: set[Any], content: list[Any]) -> None:
    set.clear(item)
    set.update(item, content)


def _refill_deque(item: deque[Any], content: list[Any]) -> None:
    deque.clear(item)
    deque.extend(item, content)


def _in_cell(item: CellType) -> list[Any]:
    try:
        return [item.cell_contents]
    except ValueError:  # it is empty
        return []


def _refill_cell(item: CellType, content: list[Any]) -> None:
    if content:
        item.cell_contents = content[0]
    else:
        del item.cell_contents


def _refill_attributes(item: Any, content: dict[str, Any]) -> None:
    held = vars(item)
    held.update(content)
    if len(held) != len(content):
        for name in held.keys() - content.keys():
            del held[name]


def _slots(kind: type) -> dict[str, MemberDescriptorType]:
    bases = [vars(base) for base in reversed(kind.__mro__) if "__slots__" in vars(base)]
    return {name: slot for held in bases for name, slot in held.items() if isinstance(slot, MemberDescriptorType)}


def _in_slots(item: Any) -> dict[str, Any]:
    found = {}
    for name, slot in _slots(type(item)).items():
        try:
            found[name] = slot.__get__(item)
        except AttributeError:  # it is not set
            continue
    return found


def _refill_slots(item: Any, content: dict[str, Any]) -> None:
    held = _in_slots(item)
    for name, slot in _slots(type(item)).items():
        if name in content:
            slot.__set__(item, content[name])
        elif name in held:
            slot.__delete__(item)


def _whole(read: Callable[[Any], Any], write: Callable[[Any, Any], Any]) -> Access:
    """Return the access to objects that are read and written as a whole."""

    def refill(item: Any, content: list[Any]) -> None:
        write(item, content[0])

    return Access(lambda item: [read(item)], refill, is_whole=True)


def _write_array(item: Any, content: Any) -> None:
    if item.flags.writeable:
        item[...] = content


def _write_bits(item: np.random.Generator, content: Any) -> None:
    item.bit_generator.state = content


ATTRIBUTES = Access(vars, _refill_attributes)
"""The access to an object's attributes."""

SLOTS = Access(_in_slots, _refill_slots)

_KINDS: tuple[tuple[type, Access], ...] = (
    (dict, Access(_items, _refill_dict)),
    (list, Access(lambda item: item, lambda item, content: list.__setitem__(item, slice(None), content))),
    (set, Access(lambda item: item, _refill_set)),
    (deque, Access(lambda item: item, _refill_deque)),
    (CellType, Access(_in_cell, _refill_cell)),
    (bytearray, _whole(bytes, lambda item, content: bytearray.__setitem__(item, slice(None), content))),
    (array, _whole(array.__copy__, lambda item, content: array.__setitem__(item, slice(None), content))),
    (np.memmap, Access(lambda item: [], lambda item, content: None)),
    (np.ndarray, _whole(np.copy, _write_array)),
    (torch.Generator, _whole(torch.Generator.get_state, torch.Generator.set_state)),
    (random.Random, _whole(lambda item: item.getstate(), lambda item, content: item.setstate(content))),
    (np.random.RandomState, _whole(lambda item: item.get_state(), lambda item, content: item.set_state(content))),
    (np.random.Generator, _whole(lambda item: item.bit_generator.state, _write_bits)),
)


@lru_cache(maxsize=1024)
def accesses(kind: type) -> tuple[Access, ...]:
    """Return how the mutable parts of a class's objects are read and refilled; none if the objects count as one thing."""
    container = next((access for base, access in _KINDS if issubclass(kind, base)), None)
    found = [] if container is None else [container]
    if is_open(kind) or issubclass(kind, nn.Module):
        found += [ATTRIBUTES] if kind.__dictoffset__ else []
        found += [SLOTS] if _slots(kind) else []
    return tuple(found)


def is_open(kind: type) -> bool:
    """Whether the attributes of a class's objects are looked into: those of Python, NumPy and torch itself are not."""
    place = str(kind.__module__)
    root = place.partition(".")[0]
    if issubclass(kind, (type, Enum, ModuleType, torch.Tensor, tuple, frozenset)) or root == "numpy":
        return False
    if root == "torch":
        return place.startswith(_OPEN_ALTHOUGH_OF_TORCH)
    return root in _OPEN_ALTHOUGH_OF_PYTHON or root not in sys.stdlib_module_names


def fixed_parts(item: Any) -> Iterable[Any] | None:
    """Return the parts of an object that cannot be exchanged, or None for any other object."""
    if isinstance(item, (tuple, frozenset)):
        return item
    if isinstance(item, MethodType):
        return item.__self__, item.__func__
    if isinstance(item, FunctionType):
        return (
            item.__code__,
            *(item.__closure__ or ()),
            *(item.__defaults__ or ()),
            *(item.__kwdefaults__ or {}).values(),
        )
    if isinstance(item, partial):
        return item.func, item.args, item.keywords
    return None
