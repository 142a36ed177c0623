"""How a graph was captured, and how it is called."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

CONSTANTS = "captured_constants"
"""The attribute under which a running module holds the constants of its graph; their names begin with it."""


class Signature(Protocol):
    """How a model is called: from its arguments to the graph's flat inputs, and from the graph's flat outputs back.

    ``inputs`` are the names of the graph's placeholders, in order; the graph's output node holds a flat tuple.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's placeholders, in order."""

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one value for each of ``inputs``; raise InputError where the structure is another one."""

    def unflatten(self, values: tuple[Any, ...]) -> Any:
        """Return the model's output, in its own structure, from the graph's flat outputs."""

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Identify the input kind of a call: calls with equal keys can run the same graph."""


@dataclass(frozen=True)
class Kept:
    """A submodule that capture kept whole, as one node, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Capture:
    """How the graph was obtained.

    Attributes:
        method: The technique that succeeded: ``record``, ``export`` or ``symbolic``.
        kept: Submodules kept whole, with the reason.
        verified: Whether outputs, gradients and buffers were compared with the original's.
        tried: Rungs that were refused before, each with its reason.
        guards: How many guards the graph holds; one that fires has the model captured anew.
    """

    method: str
    kept: tuple[Kept, ...] = ()
    verified: bool = False
    tried: tuple[tuple[str, str], ...] = ()
    guards: int = 0
