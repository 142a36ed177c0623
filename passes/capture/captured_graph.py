"""What every capture method returns."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from dnifx.ir import Kept
from dnifx.passes.capture.signature import CapturedSignature


@dataclass(frozen=True)
class CapturedGraph:
    """A captured graph and what is needed to run it.

    Attributes:
        graph: The graph over the model's own module paths. Its output is a flat tuple.
        signature: How the graph is called.
        constants: Values that the graph reads and the model does not hold, by the name that the graph reads.
        kept: Submodules kept whole, and why.
        guards: Number of guards in the graph. A guard that fails raises ``dnifx.runtime.emitted.ops.GuardError``.
        notes: How the graph differs from the model, in words for the user.
        steered: The lines at which a draw decides what the model does; the graph holds for one outcome.
        unused: The lines that draw numbers which nothing in the graph uses. Python may have taken them in a way that nothing shows.
    """

    graph: fx.Graph
    signature: CapturedSignature
    constants: Mapping[str, object]
    kept: tuple[Kept, ...] = ()
    guards: int = 0
    notes: tuple[str, ...] = ()
    steered: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
