"""What a model keeps in plain attributes from call to call: saved with a trainer, and put back."""

import copy
import sys
from collections import deque
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnifx.errors import StateError
from dnifx.ir import Signature

REFILLED = (list, dict, set, deque)
"""Containers that stay, and get another content: others may hold them too."""


class Missing:
    """Stands for the value of an attribute that is not there."""


class KeptAttributes:
    """The plain attributes that a model changes when it is called.

    A tensor is saved without the graph that made it: no gradient goes past a saved state. What forward leaves with a gradient
    and never reads again, such as a term of the loss, is not saved, since the next call leaves it anew. Variables of Python
    modules that forward changes are kept too, but no variable of an enclosing function, which has no name elsewhere.

    Args:
        model: The model.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._changed: dict[str, None] = {}
        self._in_place: set[str] = set()
        self._read_again: set[str] = set()

    def note(self, signature: Signature) -> None:
        """Note what a captured graph changes."""
        self._changed.update(dict.fromkeys(filter(is_named, signature.changed)))
        self._in_place.update(filter(is_named, signature.in_place))
        self._read_again.update(set(signature.changed) - set(signature.results))

    def state_dict(self) -> dict[str, Any]:
        """Return what the attributes hold, by path: ``self.cell.hidden``.

        Raises:
            StateError: One holds an object that cannot be copied.
        """
        found = {}
        for path in self._changed:
            holder, name = self.place(path)
            value = getattr(holder, name, Missing)
            if value is not Missing and (path in self._read_again or not carries_gradient(value)):
                found[path] = saved(value, path)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put saved values back.

        Raises:
            StateError: The model has no place for one.
        """
        places = [self.place(path) for path in state]
        for (path, value), (holder, name) in zip(state.items(), places, strict=True):
            now: Any = getattr(holder, name, Missing)
            fits = isinstance(now, Tensor) and isinstance(value, Tensor) and now.shape == value.shape
            if fits and path in self._in_place:  # graphs write to this very tensor
                with torch.no_grad():
                    now.copy_(value)
            elif isinstance(now, REFILLED) and isinstance(value, dict | list | set) and name in vars(holder):
                refill(now, value)
            else:
                setattr(holder, name, saved(value, path))

    def undo(self) -> Callable[[], None]:
        """Return what puts back all that a run changes before its end: the graphs leave the other attributes at their end."""
        places = [self.place(path) for path in self._in_place]
        before: list[tuple[Any, str, Any]] = [(holder, name, getattr(holder, name, Missing)) for holder, name in places]
        copies = [each.clone() if isinstance(each, Tensor) else copy.copy(each) for *_, each in before]

        def put_back() -> None:
            with torch.no_grad():
                for (holder, name, value), content in zip(before, copies, strict=True):
                    if isinstance(value, Tensor):
                        value.copy_(content)
                    elif isinstance(value, REFILLED):
                        refill(value, content)
                    if value is not Missing:
                        setattr(holder, name, value)
                    elif hasattr(holder, name):
                        delattr(holder, name)

        return put_back

    def place(self, path: str) -> tuple[Any, str]:
        """Return the module or object that holds an attribute, and the attribute's name.

        Raises:
            StateError: The model has no such module or object.
        """
        try:
            return place_of(self.model, path)
        except AttributeError as error:
            raise StateError(
                f"the saved state has {path}, and {type(self.model).__name__} has no place for it: {error}; make the trainer with "
                "the same model"
            ) from error


def is_named(path: str) -> bool:
    """Whether a path leads to an attribute of a model, or to a variable of a Python module that is imported."""
    module, colon, _ = path.partition(":")
    return not colon or module in sys.modules


def place_of(model: nn.Module, path: str) -> tuple[Any, str]:
    """Return what holds an attribute, ``self.cell.hidden``, or a variable, ``train:state.hidden``, and its name there."""
    module, colon, names = path.partition(":")
    if not colon:
        _, *steps, name = path.split(".")
        return reduce(getattr, steps, model), name
    *steps, name = names.split(".")
    if module not in sys.modules:
        raise AttributeError(f"no Python module {module!r} is imported")
    root: Any = sys.modules[module]
    return reduce(getattr, steps, root), name


def refill(container: Any, content: Any) -> None:
    """Give a container another content."""
    container.clear()
    container.update(content) if isinstance(container, dict | set) else container.extend(content)


def carries_gradient(value: Any) -> bool:
    """Whether a value holds a tensor that a graph made."""
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in pytree.tree_leaves(value))


def saved(value: Any, path: str) -> Any:
    """Return a value in containers of its own, its tensors without their graphs."""

    def leaf(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.detach().requires_grad_(part.requires_grad and part.is_leaf)
        try:
            return copy.deepcopy(part)
        except Exception as error:
            raise StateError(
                f"{path} holds a {type(part).__name__}, which cannot be saved ({error}); keep tensors, numbers and texts there, in lists, "
                "tuples and dicts"
            ) from error

    kept = pytree.tree_map(leaf, value)
    return list(kept) if isinstance(kept, deque) else kept
