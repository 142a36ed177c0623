"""How a captured graph is called: from the model's arguments to the graph's inputs, and back to the model's output."""

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnifx.errors import InputError
from dnifx.passes.capture.model_state import Read, Write, fixed
from dnifx.passes.capture.record.node_values import Path
from dnifx.passes.capture.record.structure import follow, path_name, walk
from dnifx.passes.graph import listed

SHARED_NAMES = ("target", "context", "reset", "diagnose", "kwargs")
"""Arguments of a decoupled module or a training step; a model may have arguments of the same names."""


@dataclass(frozen=True)
class Leaf:
    """A leaf of the arguments: a tensor with its number of dimensions, or the fixed value of anything else."""

    path: Path
    dimensions: int | None
    value: Hashable = None

    def __str__(self) -> str:
        name = path_name(self.path)
        if self.dimensions is not None:
            return f"{name}: tensor of {self.dimensions} dimensions"
        typed = isinstance(self.value, tuple) and len(self.value) == 2
        return f"{name}={self.value[1]!r}" if typed else f"{name}={self.value}"  # type: ignore[index]


def forward_signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of the model's forward, without ``self``."""
    return inspect.signature(model.forward)


@dataclass(frozen=True)
class ForwardCall:
    """How a forward method binds its arguments."""

    signature: inspect.Signature
    model: str

    @classmethod
    def of(cls, model: nn.Module) -> "ForwardCall":
        """Return the call of a model's forward."""
        parameters = forward_signature(model).parameters.values()
        unannotated = [part.replace(annotation=inspect.Parameter.empty) for part in parameters]
        return cls(inspect.Signature(unannotated), type(model).__name__)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """Match arguments to parameters and fill in the defaults.

        Raises:
            InputError: The forward method does not take these arguments.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"{self.model} cannot be called with these arguments: {error}; its forward takes {self.signature}{self.hint}"
            ) from error
        bound.apply_defaults()
        return bound

    @property
    def hint(self) -> str:
        """How to give an argument whose name the net uses too, for an error text; nothing where there is none."""
        shared = [name for name in SHARED_NAMES if name in self.signature.parameters]
        return (
            f". The net and its trainer use {shared[0]!r} too: give it as kwargs={{{shared[0]!r}: ...}}"
            if shared
            else ""
        )

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, so that position, keyword and default mean the same."""
        named: dict[str, Any] = {}
        for name, value in self.bind(args, kwargs).arguments.items():
            gathers_keywords = self.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            named.update(value if gathers_keywords else {name: value})
        return named


def leaves_of(named: Mapping[str, Any]) -> tuple[Leaf, ...]:
    """Return the leaves of arguments by name; where a tensor appears twice, the second leaf says so."""
    return tuple(
        Leaf(path, leaf.dim()) if isinstance(leaf, Tensor) else Leaf(path, None, fixed(leaf))
        for path, leaf in walk(dict(named), whole=True)
    )


@dataclass(frozen=True)
class CapturedSignature:
    """The tensors among the arguments and among what the model's attributes hold are the graph's inputs.

    Everything else is fixed by the capture. What forward leaves on the model follows the output among the graph's outputs.

    Attributes:
        inputs: Names of the graph's placeholders, in order: tensors of arguments, tensors of attributes, numbers of attributes.
        call: How the forward method binds its arguments.
        leaves: The leaves of the example's arguments.
        output: Builds the model's output from the graph's flat outputs.
        plain: Whether the example gave nothing but tensors, by position.
        probe: A parameter of the model: its dtype is part of the input kind.
        modules: Modules whose training flags are part of the input kind.
        fixed: Attributes whose values are part of the input kind.
        held: Attributes that hold tensors, which are inputs; their structure is part of the input kind.
        numbers: Attributes whose numbers are inputs.
        writes: What forward leaves on the model.
        in_place: Attributes that forward does not assign, and whose content it changes: ``self.bank``.
        asked: What Python asked of tensors, ``requires_grad`` and ``is_contiguous``: of the inputs it is part of the input kind.
        learners: The parameters, where Python asked what requires a gradient.
        outside: The variables outside of the model that its functions name.
    """

    inputs: tuple[str, ...]
    call: ForwardCall
    leaves: tuple[Leaf, ...]
    output: Callable[[Sequence[Any]], Any]
    plain: bool
    probe: Tensor | None = None
    modules: tuple[nn.Module, ...] = ()
    fixed: tuple[Read, ...] = ()
    held: tuple[Read, ...] = ()
    numbers: tuple[Read, ...] = ()
    writes: tuple[Write, ...] = ()
    in_place: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    learners: tuple[Tensor, ...] = ()
    outside: tuple[Read, ...] = ()

    def differences(self, one: Any, other: Any) -> list[str]:
        """Return the names of the arguments and attributes in which two keys of this kind of signature differ."""
        leaves = set(one[0]) ^ set(other[0])
        values = zip(self.fixed, one[3], other[3], strict=False)
        changed = [each.path for each, before, now in values if before != now]
        return [*dict.fromkeys(path_name(leaf.path) for leaf in leaves), *changed]

    def facts(self, tensor: Tensor) -> Hashable:
        """Return what of an input, beside its sizes, is part of the input kind."""
        if not self.asked:
            return tensor.dtype
        contiguous = "is_contiguous" in self.asked and tensor.is_contiguous()
        return tensor.dtype, "requires_grad" in self.asked and tensor.requires_grad, contiguous

    @property
    def varying(self) -> tuple[str, ...]:
        """The attributes whose numbers and tensors are inputs, or are others now than when the model was captured."""
        moved = [each for each in self.fixed if each.moved]
        return tuple(each.path for each in (*self.numbers, *self.held, *moved))

    @property
    def kept(self) -> tuple[str, ...]:
        """The attributes that the graph takes from the model or leaves there."""
        read = [each.path for each in (*self.numbers, *self.held)]
        return tuple(dict.fromkeys([*read, *(each.path for each in self.writes)]))

    @property
    def left_at(self) -> tuple[str, ...]:
        """For each output that forward leaves on the model, its attribute."""
        return tuple(each.path for each in self.writes for _ in range(each.count))

    @property
    def results(self) -> tuple[str | None, ...]:
        """For each output that forward leaves on the model, its attribute; None for a state, which forward reads too."""
        read = {each.path for each in (*self.numbers, *self.held, *self.fixed)}
        return tuple(None if path in read else path for path in self.left_at)

    @property
    def changed(self) -> tuple[str, ...]:
        """The attributes that a call changes."""
        return (*(each.path for each in self.writes), *self.in_place)

    @property
    def left(self) -> int:
        """How many of the flat outputs, the last ones, forward leaves on the model."""
        return sum(each.count for each in self.writes)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments and the attributes that hold tensors, by name."""
        return {**self.call.named(args, kwargs), **{each.path: each.value for each in self.held}}

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "CapturedSignature":
        """Return the signature of a call before its graph is known: without inputs, output and modules."""
        call = ForwardCall.of(model)
        leaves = leaves_of(call.named(args, kwargs))
        tensors = sum(leaf.dimensions is not None for leaf in leaves)
        plain = not kwargs and len(args) == tensors and all(isinstance(arg, Tensor) for arg in args)
        probe = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
        return cls((), call, leaves, tuple, plain, probe)

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        """Return each tensor among arguments of this structure, with a name for its input."""
        named = self.call.named(args, kwargs)
        return [(path_name(leaf.path), follow(named, leaf.path)) for leaf in self.leaves if leaf.dimensions is not None]

    def is_direct(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the arguments are the inputs as they are, each a tensor of its own, so that nothing has to be bound."""
        return (
            self.plain
            and not self.held
            and not kwargs
            and len(args) == len(self.leaves) == len(set(map(id, args)))
            and all(
                isinstance(arg, Tensor) and arg.dim() == leaf.dimensions
                for arg, leaf in zip(args, self.leaves, strict=False)
            )
        )

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one tensor for each of ``inputs``.

        Raises:
            InputError: The arguments have another structure than the example's, or other values that are not tensors.
        """
        numbers = tuple(each.value for each in self.numbers)
        if self.is_direct(args, kwargs):
            return (*args, *numbers) if numbers else args
        named = self.named(args, kwargs)
        leaves = leaves_of(named)
        if leaves != self.leaves:
            raise InputError(difference(self.call.model, self.leaves, leaves))
        return (*(follow(named, leaf.path) for leaf in leaves if leaf.dimensions is not None), *numbers)

    def unflatten(self, values: tuple[Any, ...]) -> Any:
        """Return the model's output, in its own structure."""
        return self.output(values)

    def write_back(self, values: Sequence[Any]) -> None:
        """Leave on the model what a run of the graph computed for its attributes."""
        place = len(values) - self.left
        for each in self.writes:
            each.leave(values[place : place + each.count])
            place += each.count

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Identify the input kind of a call: all that the model's Python code may branch on.

        The key holds the structure of the arguments, the dtypes of the tensors, the values of everything else, the
        training flags of ``modules``, the values of ``fixed``, the model's dtype and the autocast state.
        """
        if self.is_direct(args, kwargs):
            leaves, dtypes = self.leaves, tuple(self.facts(arg) for arg in args)
        else:
            named = self.named(args, kwargs)
            leaves = leaves_of(named)
            dtypes = tuple(self.facts(follow(named, leaf.path)) for leaf in leaves if leaf.dimensions is not None)
        flags = (*(module.training for module in self.modules), *(each.requires_grad for each in self.learners))
        values = tuple(each.key for each in self.fixed)
        kinds = tuple(type(each.value) for each in self.numbers)
        device = "cpu" if self.probe is None else self.probe.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        cast = torch.get_autocast_dtype(device) if casts else None
        return leaves, dtypes, flags, values, kinds, None if self.probe is None else self.probe.dtype, cast


def difference(model: str, expected: tuple[Leaf, ...], found: tuple[Leaf, ...]) -> str:
    """Return the error text for arguments of another structure."""
    missing = [str(leaf)[:120] for leaf in expected if leaf not in found]
    added = [str(leaf)[:120] for leaf in found if leaf not in expected]
    return (
        f"{model} was captured with other inputs:\n"
        f"  expected {listed(missing, 4) or 'nothing more'}\n  got      {listed(added, 4) or 'nothing more'}\n"
        "call it as the example inputs did, or decouple the model again with an example of this call"
    )
