"""Containers that forward fills and does not read: what they hold is no part of the input kind."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dnifx.passes.capture.model_state import Read
from dnifx.passes.capture.record.state import preserved
from dnifx.passes.capture.record.structure import copied_arguments

_WRITES: Mapping[Any, set[str]] = {list: {"append", "extend", "clear"}, dict: {"__setitem__", "update", "clear"}}
_OF_ALL_OBJECTS = frozenset(dir(object)) - {"__eq__", "__ne__"}
_STAND_IN = object()


class _Reading(Exception):
    """A container that is only filled was read."""


def _refuse(*_: Any, **__: Any) -> Any:
    raise _Reading


def _only_filled(kind: type) -> type:
    """Return a class of containers that raise when they are read."""
    names = [name for name in dir(kind) if name not in _OF_ALL_OBJECTS | _WRITES[kind] | {"__class_getitem__"}]
    return type(f"Filled{kind.__name__}", (kind,), dict.fromkeys(names, _refuse))


_FILLED: Mapping[type, type] = {kind: _only_filled(kind) for kind in _WRITES}


def added_unread(
    model: nn.Module, at: Read, args: tuple[Any, ...], kwargs: Mapping[str, Any], outside: Iterable[Read]
) -> list[Any] | None:
    """Run a model with stand-ins in a container; return what is added, or None where forward reads it, or adds nothing alone.

    Args:
        model: The model; it is left as it was.
        at: The attribute that holds the container.
        args: Positional arguments.
        kwargs: Keyword arguments.
        outside: The variables outside of the model that its functions name; they are left as they were too.

    Returns:
        For a list the positions behind what it held, for a dictionary the keys.
    """
    value = at.value
    kind = type(value)
    if kind not in _FILLED:
        return None
    own_args, own_kwargs = copied_arguments(args, kwargs)
    fill: Callable[[Any, Any], None] = dict.update if kind is dict else list.extend
    filled = _FILLED[kind]()
    fill(filled, dict.fromkeys([*value, _STAND_IN], _STAND_IN) if kind is dict else [_STAND_IN])
    with preserved(model, outside), torch.enable_grad():
        setattr(at.holder, at.name, filled)
        try:
            model(*own_args, **own_kwargs)
        except Exception:  # noqa: BLE001 - it was read, or the stand-ins were
            return None
        if at.value is not filled:
            return None
        if kind is list:
            items = list.__getitem__(filled, slice(None))
            return [*range(len(items) - 1)] or None if items[:1] == [_STAND_IN] else None
        kept = dict.__contains__(filled, _STAND_IN)
        return (
            [key for key in dict.keys(filled) if dict.__getitem__(filled, key) is not _STAND_IN] or None
            if kept
            else None
        )
