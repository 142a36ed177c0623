"""What interface nodes keep of a backward pass, where somebody wants to see it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dnifx.runtime.emitted.fitting import compare, per_example
from dnifx.runtime.emitted.loss_scale import Factor
from dnifx.runtime.emitted.parameter_gradients import parameter_cosine


@dataclass
class Recorder:
    """How estimates compared with the gradients that arrived in the last backward pass.

    Attributes:
        parameters: By boundary name, what its producer trains and no other partition reads.
        found: By boundary name, what ``compare`` and ``parameter_cosine`` say.
    """

    parameters: Mapping[str, Sequence[Tensor]]
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def see(
        self,
        boundary: str,
        values: Sequence[Tensor],
        estimates: Sequence[Tensor],
        arriving: Sequence[Tensor],
        weight: float,
        scale: Factor,
    ) -> None:
        """Compare the estimates of a boundary with the gradients that arrived there.

        Args:
            boundary: Its name.
            values: Its values, with the graph of what makes them.
            estimates: Per-example synthetic gradients.
            arriving: The gradients that arrived.
            weight: Weight of an example in the loss.
            scale: What the loss was multiplied by.
        """
        targets = [per_example(each, weight) / scale for each in arriving]
        producer = parameter_cosine(values, self.parameters.get(boundary, ()), estimates, targets)
        self.found[boundary] = {**compare(estimates, targets), **producer}


PRESENT: ContextVar[Recorder | None] = ContextVar("PRESENT", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let the interface nodes of a forward pass tell a recorder of its backward pass."""
    token = PRESENT.set(recorder)
    try:
        yield
    finally:
        PRESENT.reset(token)


def present_recorder() -> Recorder | None:
    """Return who records the forward pass that runs; nobody while something compiles."""
    return None if torch.compiler.is_compiling() else PRESENT.get()
