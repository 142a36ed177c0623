"""Walks over the objects that models take and return: which tensors they hold, and under which names."""

import inspect
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dnifx.passes.capture.record.node_values import Path
from dnifx.passes.capture.record.sizes import SymbolicFloat, SymbolicInt
from dnifx.runtime.emitted.ops import Template, children

DEPTH = 12
"""How deep objects are looked into."""


@dataclass(frozen=True)
class SameTensor:
    """Takes the place of a tensor that the object holds a second time."""

    first: Path

    def __repr__(self) -> str:
        return f"the same object as {path_name(self.first)}"


@dataclass(frozen=True)
class EmptyContainer:
    """Takes the place of a part without leaves."""

    kind: str

    def __repr__(self) -> str:
        return f"an empty {self.kind}"


def tensors_in(item: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors that an object holds, each once, with the path to it."""
    return [(path, part) for path, part in walk(item) if isinstance(part, Tensor)]


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return what holds the values of a tensor: itself, a sparse one made dense, or the rows of a nested one."""
    if tensor.is_nested:
        return list(tensor.unbind())
    return [tensor if tensor.layout is torch.strided else tensor.to_dense()]


def variables_in(item: Any) -> list[Any]:
    """Return what may change from call to call in an object: its tensors and symbolic numbers, each once."""
    parts = walk(item, functions=True)
    return [part for _, part in parts if isinstance(part, Tensor | SymbolicInt | SymbolicFloat)]


def walk(item: Any, functions: bool = False, whole: bool = False) -> Iterator[tuple[Path, Any]]:
    """Yield the leaves of an object with the path to each; an object that appears twice is walked once.

    Args:
        item: The object.
        functions: Whether to look into the closures of functions.
        whole: Whether to describe the whole structure: to walk a container each time that it appears, and to yield a
            ``SameTensor`` for a tensor that appears again and an ``EmptyContainer`` for a part without leaves.
    """
    yield from _walk(item, (), {}, functions, whole)


def _walk(item: Any, path: Path, seen: dict[int, Path], functions: bool, whole: bool) -> Iterator[tuple[Path, Any]]:
    number = isinstance(item, SymbolicInt | SymbolicFloat)
    parts = _parts(item, functions) if len(path) < DEPTH and not number else None
    known = (parts is not None or number or isinstance(item, Tensor)) and id(item) in seen
    if whole and parts == []:
        yield path, EmptyContainer(type(item).__name__)
    elif known and not (whole and isinstance(item, tuple | list | dict)):
        if whole and parts is None:
            yield path, SameTensor(seen[id(item)])
    else:
        seen.setdefault(id(item), path)
        if parts is None:
            yield path, item
        for step, part in parts or ():
            yield from _walk(part, (*path, step), seen, functions, whole)


def _parts(item: Any, functions: bool) -> list[tuple[tuple[str, Any], Any]] | None:
    if isinstance(item, torch.Size):
        return [(("item", index), part) for index, part in enumerate(item)]
    if isinstance(item, Enum) or (inspect.isroutine(item) and not functions):
        return None
    if isinstance(item, Mapping) and not isinstance(item, nn.Module):
        return [(("item", key), item[key]) for key in list(item)]
    names = getattr(item, "_fields", None) if isinstance(item, tuple) else None
    if names is not None and len(names) == len(item):
        return [(("attribute", name), part) for name, part in zip(names, item, strict=True)]
    parts = children(item)
    if parts is None:
        return None
    kind = "item" if isinstance(item, tuple | list | set | frozenset | deque) else "attribute"
    return [((kind, key), part) for key, part in parts]


def copied_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with tensors of their own, which a model may write into."""
    held = (tuple(args), dict(kwargs))
    tensors = [tensor for _, tensor in tensors_in(held)]
    fresh = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    copies: tuple[tuple[Any, ...], dict[str, Any]] = Template(held, tensors).build(fresh)
    return copies


def follow(item: Any, path: Path) -> Any:
    """Return the part of an object that a path leads to."""
    for kind, key in path:
        item = item[key] if kind == "item" else getattr(item, key)
    return item


def path_name(path: Path) -> str:
    """Return a path as an identifier: ``x``, ``batch_mask``, ``states_0``."""
    shown = [str(key) for kind, key in path if kind == "item" or not str(key).startswith("_")]
    text = "_".join(part.strip("_") for part in shown)
    text = "".join(letter if letter.isalnum() else "_" for letter in text)
    return text if text[:1].isalpha() else f"input_{text}".rstrip("_")


def gives_tensors(result: Any) -> bool:
    """Whether what a call returned holds a tensor."""
    if isinstance(result, Tensor):
        return True
    if result is None or isinstance(result, bool | int | float | str | torch.dtype | torch.device):
        return False
    return bool(tensors_in(result))


def tensors_among(arguments: Iterable[Any]) -> set[int]:
    """Return the identities of the tensors among a call's arguments, and in the lists and tuples among them."""
    items = [*arguments]
    parts = chain.from_iterable(item for item in items if type(item) in (list, tuple))
    return {id(item) for item in chain(items, parts) if isinstance(item, Tensor)}


def views_of(given: Container[int], result: Any) -> Any:
    """Replace the tensors of a result that a call was given by views of them."""
    if isinstance(result, Tensor):
        viewed = id(result) in given and result.layout is torch.strided and not result.is_nested
        return result.view_as(result) if viewed else result
    if type(result) in (list, tuple):
        return type(result)(views_of(given, part) for part in result)
    if type(result) is dict:
        return {key: views_of(given, part) for key, part in result.items()}
    return result


def contents_of(arguments: Any) -> tuple[int, ...]:
    """Return the identities of what the objects among a call's arguments hold, to see whether the call changes them."""
    args, kwargs = arguments
    objects = [item for item in (*args, *kwargs.values()) if not isinstance(item, _PLAIN)]
    return tuple(id(leaf) for _, leaf in walk(objects)) if objects else ()


_PLAIN = (Tensor, bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device)
