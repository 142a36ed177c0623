"""The loss scale: what a training loop multiplies the loss by, as interface nodes learn of it in the backward pass.

Estimates are per example and in units of the true loss. Where the loss is multiplied by s before its backward pass, the values
receive s times their estimates, and the loss of every fit counts s times too: all that is left in ``.grad`` is the gradient of s
times a loss. So one ``scaler.unscale_`` fits model and estimators alike, and the fits of k micro-batches, each of loss / k, add up
to the fit of all their examples.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

Factor = float | Tensor
"""A number, or a tensor of one element."""


class LossScale:
    """Says in a backward pass what the loss was multiplied by.

    Args:
        value: A number, a tensor of one element, a callable that returns either, or a ``GradScaler``.
        begins: Called by the first interface node that a backward pass reaches, with the factor, and whether the loss said it.
    """

    def __init__(
        self,
        value: Factor | Callable[[], Factor] | GradScaler = 1.0,
        begins: Callable[[Factor, bool], None] | None = None,
    ) -> None:
        self.value = value
        self.begins = begins
        self._pass = -1

    def reached(self, factor: Factor, known: bool) -> None:
        """Note that a backward pass has reached an interface node."""
        current = torch._C._current_graph_task_id()
        if self.begins is not None and current != self._pass:
            self._pass = current
            self.begins(factor, known)

    def now(self, device: torch.device) -> Factor:
        """Return the factor, on a device where it is a tensor."""
        if isinstance(self.value, GradScaler):
            return self.value.scale(torch.ones((), device=device))
        found = self.value if isinstance(self.value, Tensor) or not callable(self.value) else self.value()
        return found.detach().reshape(()).to(device) if isinstance(found, Tensor) else found

    def compiled(self) -> Factor:
        """Return what a graph that is compiled takes: a tensor, which the backward pass reads, or the number of this call."""
        if isinstance(self.value, GradScaler):
            return self.value.scale(torch.ones(()))
        return self.value if isinstance(self.value, Tensor) or not callable(self.value) else self.value()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LossScale":
        return LossScale(self.value, copy.deepcopy(self.begins, memo))


Scale = LossScale | Factor | None


def factor_of(scale: Scale, told: Tensor | None, like: Tensor) -> Factor:
    """Return the factor of the loss in the backward pass that is under way.

    Args:
        scale: What the loop says of it; None stands for 1.
        told: The gradient of the loss that the graph itself computes, a scalar, where that was differentiated: then it is the factor.
        like: A tensor on the device where it is needed.
    """
    if not isinstance(scale, LossScale):
        return told if told is not None else 1.0 if scale is None else scale
    factor = scale.now(like.device) if told is None else told
    scale.reached(factor, told is not None)
    return factor


class LossTold(torch.autograd.Function):
    """Passes the graph's own loss on; backward, gives each interface node the gradient that arrived at the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *nodes: Tensor) -> Tensor:
        """Take the loss and a scalar of each node; return the loss."""
        ctx.count = len(nodes)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the gradient through, and tell it."""
        return arriving[0], *(arriving[0].detach() for _ in range(ctx.count))


def tell_factor(loss: Tensor, nodes: Sequence[Tensor]) -> Tensor:
    """Return the loss that the graph computes; in the backward pass the nodes are told by what it was multiplied.

    Args:
        loss: A scalar.
        nodes: The last value that each interface node returned, a scalar; the factor arrives there as its gradient.
    """
    told: Tensor = LossTold.apply(loss, *nodes)  # type: ignore[no-untyped-call]
    return told
