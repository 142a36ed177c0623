"""Compares what a model holds with what it held before."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dnifx.passes.capture.record.contents import ATOMS, ATTRIBUTES, SLOTS, Held, fixed_parts, held_by

OWN = frozenset(vars(nn.Module()))
"""What every module has: registries, hooks and flags of torch."""

GONE = object()
"""Takes the place of an attribute that is not there."""

Parts = list[tuple[str | None, Any, Any]]
"""Parts of two objects in pairs. An attribute comes with its name, a part of a container with None."""


class Pair(NamedTuple):
    """A value as it was and as it is now.

    Attributes:
        before: The value as it was.
        now: The value as it is.
        module: The module that holds it, or what holds a variable outside of the model.
        name: The attribute that it was reached from.
        text: Its dotted name, or that of the container that holds it.
        is_exact: Whether it is reached by attributes alone.
    """

    before: Any
    now: Any
    module: Any
    name: str
    text: str
    is_exact: bool = True


def changes(
    pairs: Iterable[Pair],
    saved: Mapping[int, tuple[Held, ...]],
    modules: Collection[int],
    was_written: Callable[[Tensor], bool],
) -> dict[tuple[Any, str], str]:
    """Return the attributes whose values differ, or hold what differs, with the dotted names of what does.

    Args:
        pairs: The attributes.
        saved: What objects held, by their identities. Any other object holds what it held.
        modules: Identities of objects that are only compared by identity.
        was_written: Whether the values of a tensor were changed.
    """
    found: dict[tuple[Any, str], set[str]] = {}
    seen: dict[tuple[int, int], Pair] = {}
    todo = [*pairs]
    while todo:
        pair = todo.pop()
        before, now = pair.before, pair.now
        if (id(before), id(now)) in seen:
            continue
        seen[id(before), id(now)] = pair
        parts: Parts | None
        if isinstance(before, Tensor):
            parts = [] if before is now and not was_written(before) else None
        elif isinstance(before, torch.Generator) or id(before) in modules:
            parts = [] if before is now else None
        else:
            parts = _parts(before, now, saved) if type(before) is type(now) else None
        if parts is None:
            found.setdefault((pair.module, pair.name), set()).add(pair.text)
        for name, one, other in parts or ():
            is_exact = pair.is_exact and name is not None
            text = f"{pair.text}.{name}" if is_exact else pair.text
            todo.append(pair._replace(before=one, now=other, text=text, is_exact=is_exact))
    return {key: ", ".join(sorted(texts)) for key, texts in found.items()}


def _parts(before: Any, now: Any, saved: Mapping[int, tuple[Held, ...]]) -> Parts | None:
    """Return the parts of two objects of one type in pairs; None where the objects differ by themselves."""
    if type(before) in ATOMS or isinstance(before, frozenset | np.generic):
        return [] if before is now or before == now or before != before else None
    fixed = fixed_parts(before)
    if fixed is not None:
        return _in_pairs([*fixed], [*(fixed_parts(now) or ())])
    held = saved[id(before)] if id(before) in saved else held_by(before)
    if isinstance(before, np.ndarray):
        array = held[0].content[0]
        return [] if array.shape == now.shape and array.tobytes() == now.tobytes() else None
    if not held:
        return [] if before is now else None
    found: Parts = []
    for each in held:
        parts = _held_parts(each, each.access.read(now))
        if parts is None:
            return None
        found += parts
    return found


def _held_parts(held: Held, live: Any) -> Parts | None:
    """Return what an object held and what another one holds now in pairs; None where the two do not match."""
    item, content = held.item, held.content
    if isinstance(live, set):
        return [] if live == set(content) else None
    if not isinstance(content, dict):
        return _in_pairs(content, [*live])
    if held.access in (ATTRIBUTES, SLOTS):
        names = [name for name in {**content, **live} if not (name in OWN and isinstance(item, nn.Module))]
        return [(name, content.get(name, GONE), live.get(name, GONE)) for name in names]
    if content.keys() != live.keys() or (isinstance(item, OrderedDict) and [*content] != [*live]):
        return None
    return [(None, value, live[key]) for key, value in content.items()]


def _in_pairs(content: list[Any], live: list[Any]) -> Parts | None:
    if len(content) != len(live):
        return None
    return [(None, one, other) for one, other in zip(content, live, strict=True)]
