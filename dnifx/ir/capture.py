"""How a graph was captured, and how it is called."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


def constants_root(model: nn.Module) -> str:
    """Return the attribute that holds the constants of a model's graph in a decoupled module; their paths begin with it."""
    return free_attribute(model, "captured_constants")


def free_attribute(model: nn.Module, name: str) -> str:
    """Return an attribute that a model does not have: the name, with underscores if it has that one."""
    while name in dir(model):
        name += "_"
    return name


class Signature(Protocol):
    """How a model is called: turns its arguments into the graph's flat inputs, and the graph's flat outputs back.

    The output node of the graph holds a flat tuple.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's placeholders, in order."""

    def differences(self, one: Hashable, other: Hashable) -> list[str]:
        """Return the names of the arguments and attributes in which two keys differ."""

    @property
    def varying(self) -> tuple[str, ...]:
        """The attributes whose numbers and tensors are inputs, or are others now than when the model was captured."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The attributes that the graph takes from the model or leaves there, as ``self.gate.alpha``."""

    @property
    def results(self) -> tuple[str | None, ...]:
        """For each output that forward leaves on the model, its attribute; None for a state, which forward reads too."""

    @property
    def left_at(self) -> tuple[str, ...]:
        """For each output that forward leaves on the model, its attribute."""

    @property
    def changed(self) -> tuple[str, ...]:
        """The attributes that a call changes, as ``self.gate.alpha``."""

    @property
    def in_place(self) -> tuple[str, ...]:
        """Those of ``changed`` that forward does not assign: a call changes what they hold."""

    @property
    def outside(self) -> tuple[Any, ...]:
        """The variables outside of the model that its functions name."""

    @property
    def left(self) -> int:
        """How many of the flat outputs, the last ones, forward leaves on the model."""

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one value for each of ``inputs``; raise InputError if the arguments have another structure."""

    def unflatten(self, values: tuple[Any, ...]) -> Any:
        """Return the model's output, in its own structure."""

    def write_back(self, values: tuple[Any, ...]) -> None:
        """Leave on the model what a run of the graph computed for its attributes."""

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Return a key of the call's input kind: calls with equal keys can run the same graph."""


@dataclass(frozen=True)
class Kept:
    """A submodule that capture kept whole, as one node, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Capture:
    """How the graph was obtained.

    Attributes:
        method: The capture method that succeeded: ``record``, ``export`` or ``symbolic``.
        kept: Submodules kept whole, with the reasons.
        verified: Whether outputs, gradients and buffers were compared with the original's.
        tried: Capture methods that failed before it, each with its reason.
        guards: Number of guards in the graph. When one fires, the model is captured again.
        steered: The lines at which a draw decides what the model does. Each outcome is an input kind.
        seed: The seed under which it was recorded; None for the random state of the call.
    """

    method: str
    kept: tuple[Kept, ...] = ()
    verified: bool = False
    tried: tuple[tuple[str, str], ...] = ()
    guards: int = 0
    steered: tuple[str, ...] = ()
    seed: int | None = None
