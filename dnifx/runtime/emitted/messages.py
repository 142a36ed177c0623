"""The interface node of messages in the fused graph of a net with several rates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import example_weight, fit_gradient, per_example


class MessageSwap(torch.autograd.Function):
    """As ``GradientSwap``, for messages [messages, batch, ...] whose estimates are [messages x batch, ...].

    The messages receive ``factor * g * scale``. The fit is the mean over all messages of all examples.
    """

    @staticmethod
    def forward(
        ctx: Any, boundary: str, examples: int, mean: bool, factor: float, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Take the messages, then as many estimates; return the messages."""
        count = len(tensors) // 2
        ctx.boundary, ctx.scale, ctx.factor = boundary, example_weight(examples, mean), factor
        ctx.save_for_backward(*tensors[count:])
        return tuple(value.view_as(value) for value in tensors[:count])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Give the messages the estimates, and the estimates their fit gradients."""
        estimates = ctx.saved_tensors
        synthetic = [
            (estimate.detach() * (ctx.factor * ctx.scale)).view_as(gradient).to(gradient.dtype)
            for estimate, gradient in zip(estimates, arriving, strict=True)
        ]
        fits = [
            fit_gradient(estimate, per_example(gradient, ctx.scale).view_as(estimate), len(estimate)) if want else None
            for estimate, gradient, want in zip(
                estimates, arriving, ctx.needs_input_grad[4 + len(estimates) :], strict=True
            )
        ]
        return None, None, None, None, *synthetic, *fits


def swap_messages(
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    examples: int,
    mean: bool = True,
    factor: float = 1.0,
    boundary: str = "",
) -> tuple[Tensor, ...]:
    """Return messages; backward, swap the arriving gradients for ``factor`` times the estimates and fit the estimator."""
    swapped: tuple[Tensor, ...] = MessageSwap.apply(boundary, examples, mean, factor, *values, *estimates)  # type: ignore[no-untyped-call]
    return swapped
