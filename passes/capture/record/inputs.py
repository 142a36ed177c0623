"""How a recorded graph is called: from a model's arguments to the graph's inputs, and back to the model's output."""

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnifx.errors import InputError
from dnifx.passes.capture.record.node_values import Path
from dnifx.passes.capture.record.sizes import plain_number
from dnifx.passes.capture.record.structure import Again, Empty, follow, path_name, walk
from dnifx.runtime.emitted.ops import Template

_SHOWN = 4


@dataclass(frozen=True)
class Field:
    """A leaf of the bound arguments: a tensor and its number of dimensions, or the fixed value of anything else."""

    path: Path
    dimensions: int | None
    value: Hashable = None

    def __str__(self) -> str:
        name = path_name(self.path)
        return (
            f"{name}={self.value!r}" if self.dimensions is None else f"{name}: tensor of {self.dimensions} dimensions"
        )


@dataclass(frozen=True)
class Call:
    """How a forward method binds its arguments."""

    signature: inspect.Signature
    model: str

    @classmethod
    def of(cls, model: nn.Module) -> "Call":
        """Return the call of a model's forward."""
        signature = inspect.signature(model.forward)
        parameters = [part.replace(annotation=inspect.Parameter.empty) for part in signature.parameters.values()]
        return cls(inspect.Signature(parameters), type(model).__name__)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Match arguments to parameters, so that position, keyword and default mean the same.

        Raises:
            InputError: The forward method does not take these arguments.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"{self.model} cannot be called so: {error}; its forward takes {self.signature}"
            ) from error
        bound.apply_defaults()
        keywords = next(
            (part.name for part in self.signature.parameters.values() if part.kind is part.VAR_KEYWORD), None
        )
        rest = bound.arguments.pop(keywords, {}) if keywords else {}
        return {**bound.arguments, **rest}


def fields_of(bound: Mapping[str, Any]) -> tuple[Field, ...]:
    """Return the leaves of bound arguments; where a tensor appears twice, the second time says so."""
    leaves = sorted(walk(dict(bound), whole=True), key=lambda leaf: _sortable(leaf[0], bound))
    return tuple(_field(path, leaf) for path, leaf in leaves)


def _sortable(path: Path, bound: Mapping[str, Any]) -> tuple[int, ...]:
    """Return a key that puts keywords in the order of their names and leaves the rest where it is."""
    return (list(bound).index(path[0][1]),) if path else (0,)


def _field(path: Path, leaf: Any) -> Field:
    if isinstance(leaf, Tensor):
        return Field(path, leaf.dim())
    return Field(path, None, fixed(leaf))


def fixed(leaf: Any) -> Hashable:
    """Return what identifies an argument that is no tensor."""
    leaf = plain_number(leaf)
    if isinstance(leaf, Again | Empty):
        return leaf
    if isinstance(
        leaf, bool | int | float | complex | str | bytes | type(None) | torch.dtype | torch.device | Enum | slice
    ):
        return repr(leaf) if isinstance(leaf, float | slice) else (type(leaf).__name__, leaf)
    if isinstance(leaf, np.ndarray):
        return leaf.shape, str(leaf.dtype), leaf.tobytes()
    return getattr(leaf, "__qualname__", type(leaf).__qualname__)


@dataclass(frozen=True)
class RecordedSignature:
    """Tensors of the bound arguments are the graph's inputs; everything else is part of what was recorded.

    Attributes:
        inputs: Names of the graph's placeholders, in order.
        call: How the forward method binds its arguments.
        fields: The leaves of the example's arguments.
        output: Builds the model's output around the graph's flat outputs.
        plain: Whether the example was called with distinct positional tensors alone.
        modules: The modules that were opened: their training flags are part of the input kind.
        probe: A parameter of the model: its dtype is part of the input kind.
    """

    inputs: tuple[str, ...]
    call: Call
    fields: tuple[Field, ...]
    output: Template
    plain: bool
    modules: tuple[nn.Module, ...] = ()
    probe: Tensor | None = None

    def straight(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call's arguments are the inputs as they stand, each a tensor of its own: nothing has to be bound."""
        return (
            self.plain
            and not kwargs
            and len(args) == len(self.inputs) == len(set(map(id, args)))
            and all(
                isinstance(arg, Tensor) and arg.dim() == spec.dimensions
                for arg, spec in zip(args, self.fields, strict=False)
            )
        )

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one tensor for each of ``inputs``.

        Raises:
            InputError: The arguments have another structure than the example's, or other values that are no tensors.
        """
        if self.straight(args, kwargs):
            return args
        bound = self.call.bind(args, kwargs)
        found = fields_of(bound)
        if found != self.fields:
            raise InputError(difference(self.call.model, self.fields, found))
        return tuple(follow(bound, field.path) for field in self.fields if field.dimensions is not None)

    def unflatten(self, values: tuple[Any, ...]) -> Any:
        """Return the model's output, in its own structure."""
        return self.output.build(values)

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Identify the input kind of a call: what Python code in the opened modules may branch on.

        It holds the structure of the arguments, the dtypes of the tensors, the values of everything else, the training flags
        of the opened modules, the model's dtype and the autocast state.
        """
        if self.straight(args, kwargs):
            found, dtypes = self.fields, tuple(arg.dtype for arg in args)
        else:
            bound = self.call.bind(args, kwargs)
            found = fields_of(bound)
            dtypes = tuple(follow(bound, field.path).dtype for field in found if field.dimensions is not None)
        flags = tuple(module.training for module in self.modules)
        kind = "cpu" if self.probe is None else self.probe.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        cast = torch.get_autocast_dtype(kind) if casts else None
        return found, dtypes, flags, None if self.probe is None else self.probe.dtype, cast


def difference(model: str, expected: tuple[Field, ...], found: tuple[Field, ...]) -> str:
    """Say in an error's words how two structures of arguments differ."""
    missing = [str(field) for field in expected if field not in found]
    added = [str(field) for field in found if field not in expected]
    return (
        f"{model} was captured with other inputs:\n"
        f"  expected {_listed(missing)}\n  got      {_listed(added)}\n"
        "call it as the example inputs did, or decouple the model again with an example of this call"
    )


def _listed(parts: list[str]) -> str:
    more = f", and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(part[:120] for part in parts[:_SHOWN]) + more if parts else "nothing more"
