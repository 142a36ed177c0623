"""Thin suffixes: the gradient of the user's loss through one, and its copies of the model. Imports torch, the errors and its neighbours."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnifx.errors import EstimatorError
from dnifx.runtime.emitted.fitting import example_losses
from dnifx.runtime.emitted.gradients import leaf, own_gradients


@dataclass(frozen=True)
class Mirror:
    """A read-only copy of a parameter of the model.

    Attributes:
        copy: The copy.
        source: The model's own.
        decay: How much of itself a moving average keeps in each step; None where it is taken again as a whole.
    """

    copy: Tensor
    source: Tensor
    decay: float | None = None

    def take(self) -> None:
        """Take the source's present value, or move towards it."""
        if self.decay is None:
            self.copy.copy_(self.source)
        else:
            self.copy.lerp_(self.source, 1 - self.decay)


def take_mirrors(mirrors: Iterable[Mirror], answers: Tensor, refresh: int) -> None:
    """Take mirrors again where their time has come: those that are averages in every step.

    Args:
        mirrors: The mirrors of a suffix.
        answers: Counts the answers; moved on by one.
        refresh: After how many answers copies are taken again.
    """
    with torch.no_grad():
        due = int(answers) % refresh == 0
        for mirror in mirrors:
            if due or mirror.decay is not None:
                mirror.take()
        answers += 1


def thin_gradients(
    thin: Callable[..., tuple[Any, ...]],
    loss: Callable[[tuple[Any, ...], Any], Tensor],
    values: Sequence[Tensor],
    seen: Sequence[Any],
    mean: bool,
    parameters: Iterable[Tensor],
    draws: bool,
) -> tuple[Tensor, ...]:
    """Return the gradient of each example's loss with respect to each value, through a thin suffix.

    Args:
        thin: From the boundary's values and what it reads beside them to the model's flat outputs.
        loss: From the flat outputs and the target to a scalar or one loss an example.
        values: The boundary's values.
        seen: The target of the loss, the number of examples, and what the thin suffix reads beside the values.
        mean: Whether losses are means over examples (else sums).
        parameters: What the fit trains.
        draws: Whether the thin suffix draws random numbers, which must leave the model's random state alone.
    """
    target, examples, *reads = seen
    leaves = tuple(leaf(value) for value in values)
    with torch.enable_grad(), draws_of_its_own(leaves) if draws else nullcontext():
        made = example_losses(loss(thin(*leaves, *reads), target), mean)
    return own_gradients(made.reshape(1), leaves, examples if mean else 1, tuple(parameters))


def draws_of_its_own(leaves: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Leave the model's random state alone."""
    devices = [each.device for each in leaves if each.device.type not in ("cpu", "meta")]
    return torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")


def need_target(target: Any) -> None:
    """Raise EstimatorError where a forward that trains gives suffixes no target to compare their output with."""
    if target is None and torch.is_grad_enabled():
        raise EstimatorError(
            "a suffix compares its output with the target: set net.suffix_loss to the loss and call net(x, target=y), or train with "
            "Trainer; evaluate under torch.no_grad()"
        )
