"""Gradients that estimators find by themselves. Imports torch alone, so that emitted packages can carry it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class OwnGradient(torch.autograd.Function):
    """Answers with gradients that are known already; backward, whatever arrives, asks the losses to fall."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients."""
        ctx.save_for_backward(losses)
        return tuple(gradient.clone() for gradient in gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Give the losses the gradient of their mean."""
        (losses,) = ctx.saved_tensors
        return torch.full_like(losses, 1 / losses.numel()), *(None for _ in arriving)


def leaf(value: Tensor) -> Tensor:
    """Return a value to differentiate with respect to, apart from what made it."""
    return value.detach().requires_grad_()


def own_gradients(losses: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient of each example's own loss, [batch], with respect to leaves; its fit is to make that loss small."""
    found = torch.autograd.grad(losses.sum(), tuple(leaves), retain_graph=True)
    answer: tuple[Tensor, ...] = OwnGradient.apply(losses, *found)  # type: ignore[no-untyped-call]
    return answer


def predicted_gradients(losses: Tensor, leaves: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
    """Return the gradient of each example's predicted loss, [batch], with respect to leaves, to be differentiated if ``keep``."""
    return torch.autograd.grad(losses.sum(), tuple(leaves), retain_graph=True, create_graph=keep)


class AbsoluteFit(torch.autograd.Function):
    """Turns the gradient of the squared error, which arrives, into that of the weighted absolute error."""

    @staticmethod
    def forward(ctx: Any, estimate: Tensor, weight: float) -> Tensor:
        """Return the estimate."""
        ctx.weight = weight
        return estimate.view_as(estimate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, fit: Tensor) -> tuple[Any, ...]:
        """Keep the signs: d|e - t| = sign(e - t), and the mean over examples."""
        return fit.sign() * (ctx.weight / len(fit)), None


def absolute_fit(estimate: Tensor, weight: float) -> Tensor:
    """Return the estimate; its fit loss is ``weight`` times the mean over examples of ||estimate - target||_1."""
    answer: Tensor = AbsoluteFit.apply(estimate, weight)  # type: ignore[no-untyped-call]
    return answer
