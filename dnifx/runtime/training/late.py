"""What boundaries keep for fits that come some steps late: values, context and target, and no activations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import ScheduleError, StateError
from dnifx.runtime.emitted.backward import added
from dnifx.runtime.emitted.fitting import count_only, fit_gradient, per_example
from dnifx.runtime.emitted.loss_scale import Factor

Gradients = tuple[Tensor | None, ...]
"""The gradients that one sender gave to the values of a boundary; None where it used one not at all."""


@dataclass
class Kept:
    """What one step leaves at a boundary.

    Attributes:
        values: As the estimator sees them, [batch, ...] each.
        features: Of the context, or None.
        mask: Which tokens count, [batch, length], or None.
        examples: Number of examples.
        scale: What the gradient of one example was multiplied by.
        gradients: From each sender, in the order in which they are added; the sender's rank where they have not arrived yet.
        step: The step that left it.
    """

    values: tuple[Tensor, ...]
    features: Tensor | None
    mask: Tensor | None
    examples: int
    scale: Any
    gradients: list[Gradients | int]
    step: int = 0

    @property
    def missing(self) -> list[int]:
        """The ranks whose gradients have not arrived."""
        return [each for each in self.gradients if isinstance(each, int)]

    def arrive(self, rank: int, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of all senders on a rank: each gave those of all values, one sender after the other."""
        count, given = len(self.values), iter(gradients)
        for place, each in enumerate(self.gradients):
            if each == rank and isinstance(each, int):
                self.gradients[place] = tuple(islice(given, count))

    def targets(self) -> tuple[Tensor, ...]:
        """Return the target of each value, per example."""
        sent = [each for each in self.gradients if not isinstance(each, int)]
        pairs = zip(self.values, zip(*sent, strict=True), strict=True)
        found = (per_example(summed(value, gradients), self.scale) for value, gradients in pairs)
        return tuple(each if self.mask is None else count_only(each, self.mask) for each in found)


def summed(value: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the sum of the gradients of a value in their order, as backward passes add them; zero where there are none."""
    total: Tensor | None = None
    for each in gradients:
        if each is not None:
            total = each if total is None else added(total, each)
    return torch.zeros_like(value) if total is None else total


class Late:
    """What the boundaries of a part keep, by boundary and by the step in which it is used."""

    def __init__(self) -> None:
        self.step = 0
        self._kept: dict[str, dict[int, Kept]] = {}

    def begin(self, step: int) -> None:
        """Begin a step. What was for earlier ones is dropped."""
        self.step = step
        for key, kept in self._kept.items():
            self._kept[key] = {due: each for due, each in kept.items() if due >= step}

    def keep(
        self,
        key: str,
        lag: int,
        values: Sequence[Tensor],
        features: Tensor | None,
        mask: Tensor | None,
        examples: int,
        scale: Any,
        *gradients: Gradients | int,
    ) -> None:
        """Keep copies of what a boundary has in this step, for the fit ``lag`` steps later.

        Raises:
            ScheduleError: The step is being captured as a CUDA graph.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ScheduleError(
                f"a step with a lag cannot be captured as a CUDA graph (boundary {key!r}): what is kept for later fits changes from step "
                "to step. Run the step as it comes, or leave the lag out"
            )
        copies = [each if isinstance(each, int) else tuple(map(copied, each)) for each in gradients]
        made = Kept(
            tuple(each.detach().clone() for each in values),
            copied(features),
            copied(mask),
            examples,
            scale,
            copies,
            self.step,
        )
        self._kept.setdefault(key, {})[self.step + lag] = made

    def due(self, key: str) -> Kept | None:
        """Return what a boundary kept for this step; None in the first steps, and where nothing was kept."""
        return self._kept.get(key, {}).get(self.step)

    def fill(self, key: str, rank: int, receive: Callable[[], Sequence[Tensor | None]]) -> None:
        """Receive what the senders on a rank gave, if what is due lacks it."""
        due = self.due(key)
        if due is not None and rank in due.missing:
            due.arrive(rank, receive())

    def lacking(self) -> Iterator[tuple[str, Kept]]:
        """Return what is kept for the steps to come and lacks gradients, by boundary."""
        for key, kept in self._kept.items():
            for due, each in sorted(kept.items()):
                if due > self.step and each.missing:
                    yield key, each

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept for the steps to come, as plain values."""
        return {
            key: {due: {**vars(each), "gradients": [*each.gradients]} for due, each in kept.items() if due > self.step}
            for key, kept in self._kept.items()
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Take what another rank has kept."""
        for key, kept in state.items():
            self._kept.setdefault(key, {}).update({due: Kept(**each) for due, each in kept.items()})

    def load_state_dict(self, state: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Take up what was saved.

        Raises:
            StateError: It belongs to other boundaries.
        """
        if not set(state) <= set(keys):
            raise StateError(
                f"the saved state keeps targets for the boundaries {sorted(state)}, but this trainer has {sorted(keys)}; make the "
                "trainer with the same model and cuts"
            )
        self._kept = {key: {due: Kept(**each) for due, each in kept.items()} for key, kept in state.items()}


def copied(value: Tensor | None) -> Tensor | None:
    """Return a copy that nothing else writes to."""
    return None if value is None else value.detach().clone()


def brought(state: Any, device: torch.device) -> Any:
    """Return a saved state on a device; random states, which torch keeps on the host, stay there."""
    if isinstance(state, Mapping):
        return {key: each if key == "random" else brought(each, device) for key, each in state.items()}
    return pytree.tree_map_only(Tensor, lambda each: each.to(device), state)


def fit_late(
    estimates: Sequence[Tensor], kept: Kept, factor: Factor = 1.0
) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
    """Let an estimator learn from what was kept; its answers are those of its present weights.

    Args:
        estimates: Its answers for the kept values, per example.
        kept: What was kept.
        factor: What the fit is multiplied by, as the loss is.

    Returns:
        Estimates and targets.
    """
    made = [each if kept.mask is None else count_only(each, kept.mask) for each in estimates]
    targets = kept.targets()
    gradients = [
        fit_gradient(one.detach(), target * factor, kept.examples, loss_scale=factor)
        for one, target in zip(made, targets, strict=True)
    ]
    torch.autograd.backward(made, gradients)
    return made, targets
