"""The interface node of messages in the fused graph of a net with several rates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import arriving_fit, example_weight
from dnifx.runtime.emitted.interface import gathered, passed_on, scaled
from dnifx.runtime.emitted.loss_scale import Scale, factor_of


class MessageSwap(torch.autograd.Function):
    """As ``GradientSwap``, for messages [messages, batch, ...] whose estimates are [messages x batch, ...].

    The messages receive ``factor * g * weight * s``. The fit is the mean over all messages of all examples.
    """

    @staticmethod
    def forward(
        ctx: Any,
        boundary: str,
        examples: int,
        mean: bool,
        factor: float,
        fit: str,
        fit_weight: float,
        loss_scale: Scale,
        told: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Take the messages, then as many estimates; return the messages."""
        count = len(tensors) // 2
        ctx.boundary, ctx.weight, ctx.factor, ctx.told = boundary, example_weight(examples, mean), factor, told
        ctx.fit, ctx.fit_weight, ctx.loss_scale = fit, fit_weight, loss_scale
        ctx.save_for_backward(*tensors[count:])
        return passed_on(ctx, tensors[:count])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        """Give the messages the estimates, and the estimates their fit gradients."""
        estimates = ctx.saved_tensors
        gradients, told = gathered(ctx, arriving)
        if not gradients:
            return (None,) * len(ctx.needs_input_grad)
        scale = factor_of(ctx.loss_scale, told, gradients[0])
        synthetic = [
            scaled(estimate.detach(), ctx.factor * ctx.weight, scale).view_as(gradient).to(gradient.dtype)
            for estimate, gradient in zip(estimates, gradients, strict=True)
        ]
        given = ctx.weight, scale, ctx.fit, ctx.fit_weight
        fits = [
            arriving_fit(estimate, gradient.view_as(estimate), len(estimate), *given) if want else None
            for estimate, gradient, want in zip(
                estimates, gradients, ctx.needs_input_grad[8 + len(estimates) :], strict=True
            )
        ]
        return *(None,) * 8, *synthetic, *fits


def swap_messages(
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    examples: int,
    mean: bool = True,
    factor: float = 1.0,
    boundary: str = "",
    fit: str = "squared",
    fit_weight: float = 1.0,
    loss_scale: Scale = None,
    told: bool = False,
) -> tuple[Tensor, ...]:
    """Return messages; backward, swap the arriving gradients for ``factor`` times the estimates and fit the estimator."""
    given = boundary, examples, mean, factor, fit, fit_weight, loss_scale, told
    swapped: tuple[Tensor, ...] = MessageSwap.apply(*given, *values, *estimates)  # type: ignore[no-untyped-call]
    return swapped
