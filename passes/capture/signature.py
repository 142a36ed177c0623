"""How a captured graph is called: pytrees of arguments to flat inputs, flat outputs to pytrees."""

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnifx.errors import InputError


@dataclass(frozen=True)
class Slot:
    """A place in the inputs that is not a tensor: its value is part of what was captured."""

    value: Any


@dataclass(frozen=True)
class TreeSignature:
    """Tensors of the bound arguments, in pytree order, are the graph's inputs; everything else is fixed by capture.

    Attributes:
        inputs: Names of the graph's placeholders.
        modules: Modules whose training flags the graph has frozen, if any.
        spec: Structure of the bound arguments.
        leaves: One item a leaf: None for a tensor, a Slot for a fixed value.
        output: Structure of the output; its tensors and numbers come from the graph.
        call: The forward method's signature.
        plain: Whether tensors given by position alone are the inputs as they stand.
        model: The model's class name, for error texts.
    """

    inputs: tuple[str, ...]
    spec: pytree.TreeSpec
    leaves: tuple[Slot | None, ...]
    output: pytree.TreeSpec
    call: inspect.Signature
    plain: bool
    model: str
    modules: tuple[nn.Module, ...] = ()

    def straight(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call's arguments are the inputs as they stand, with nothing to be bound or taken apart."""
        return (
            self.plain and not kwargs and len(args) == len(self.inputs) and all(isinstance(arg, Tensor) for arg in args)
        )

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the tensors among the arguments, in the order of ``inputs``."""
        if self.straight(args, kwargs):
            return args
        bound = bind(self.call, args, kwargs, self.model)
        leaves = in_order(self.spec, bound)
        if leaves is None:
            spec = pytree.tree_structure(bound)
            raise InputError(
                f"{self.model} was captured with another structure of inputs:\n  got      {spec}\n  expected {self.spec}\n"
                "call it with the structure of args= and kwargs=, or decouple it again with an example of this call"
            )
        for slot, leaf, place in zip(self.leaves, leaves, leaf_names(self.spec), strict=True):
            check_leaf(slot, leaf, place, self.model)
        return tuple(leaf for slot, leaf in zip(self.leaves, leaves, strict=True) if slot is None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TreeSignature":
        """Return itself: a signature never changes, and torch warns where a structure is copied."""
        return self

    def unflatten(self, values: tuple[Any, ...]) -> Any:
        """Return the output in the model's own structure."""
        return pytree.tree_unflatten(values, self.output)

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Identify the input kind that a call is: its structure and its fixed values."""
        flags = tuple(module.training for module in self.modules)
        if self.straight(args, kwargs):
            return self.spec, flags, ("tensor",) * len(args)
        leaves, spec = pytree.tree_flatten(bind(self.call, args, kwargs, self.model))
        return spec, flags, tuple("tensor" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)


def in_order(spec: pytree.TreeSpec, bound: Any) -> list[Any] | None:
    """Return the leaves of arguments in a structure's own order, whatever the order of keys; None in another structure."""
    try:
        leaves = spec.flatten_up_to(bound)
    except ValueError:
        return None
    return leaves if all(pytree.tree_structure(leaf).is_leaf() for leaf in leaves) else None


def check_leaf(slot: Slot | None, leaf: Any, place: str, model: str) -> None:
    """Raise InputError where a leaf is not what capture saw: a tensor, or the same fixed value."""
    if slot is None and not isinstance(leaf, Tensor):
        raise InputError(f"{model}: input {place} was captured as a tensor, got {type(leaf).__name__}; pass a tensor")
    if slot is not None and not same(slot.value, leaf):
        raise InputError(
            f"{model}: input {place} was captured as {slot.value!r}, got {describe(leaf)}; values that are not tensors are "
            "fixed by capture: decouple the model again with an example that has this value"
        )


def same(fixed: Any, leaf: Any) -> bool:
    """Whether a leaf that is no tensor is the one that capture saw."""
    return not isinstance(leaf, Tensor) and type(fixed) is type(leaf) and bool(fixed == leaf)


def describe(leaf: Any) -> str:
    """Name a leaf in an error text."""
    return f"a tensor {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def bind(call: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Match arguments to the forward method's parameters, so that positions and keywords mean the same."""
    try:
        return dict(call.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InputError(f"{model} cannot be called so: {error}; its forward takes {call}") from error


def forward_signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of the model's forward, without ``self``."""
    return inspect.signature(model.forward)


def leaf_names(spec: pytree.TreeSpec) -> list[str]:
    """Return a readable name for each leaf of bound arguments: ``x``, ``batch_mask``, ``states_0``."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    return [path_name(path) for path, _ in paths]


def path_name(path: tuple[Any, ...]) -> str:
    """Join the keys of a pytree path to an identifier."""
    text = "_".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
    text = "".join(letter if letter.isalnum() else "_" for letter in text)
    return text if text[:1].isalpha() else f"input_{text}"


def is_fixed(value: Any) -> bool:
    """Whether an input leaf is part of what is captured rather than a value of the graph."""
    return not isinstance(value, torch.Tensor)
