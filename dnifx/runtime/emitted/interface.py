"""The interface nodes: what runs on a cut in the fused graph. Emitted packages carry a copy of this and of what it imports."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import example_weight, fit_gradient, per_example


class GradientSwap(torch.autograd.Function):
    """Passes values forward; backward, gives them the synthetic gradient and gives the estimator its fit gradient.

    With per-example estimates g and arriving gradients t of n examples, where the loss sums (scale 1) or averages
    (scale 1/n) over examples: the values receive ``g * scale``, or ``(1 - mix) * g * scale + mix * t`` where some of the
    arriving gradient is mixed in; the estimates receive the gradient of the mean over examples of ||g - t / scale||^2
    (Jaderberg et al. 2017, Section 2.2).

    Synthetic inputs, where there are any, pass forward in place of the values and are fitted to them.
    """

    @staticmethod
    def forward(
        ctx: Any, boundary: str, examples: int, mean: bool, mix: float, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Take ``count`` values, as many estimates, and none or as many synthetic inputs; return what passes forward."""
        ctx.boundary, ctx.examples, ctx.mean, ctx.mix = boundary, examples, mean, mix
        values, imagined = tensors[:count], tensors[2 * count :]
        ctx.save_for_backward(*tensors[count:], *(values if imagined else ()))
        return tuple(each.view_as(each) for each in imagined or values)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Give the values the estimates; give estimates and synthetic inputs their fit gradients."""
        count, saved = len(arriving), ctx.saved_tensors
        estimates, imagined, values = saved[:count], saved[count : 2 * count], saved[2 * count :]
        scale = example_weight(ctx.examples, ctx.mean)
        synthetic = [
            mixed(estimate.detach() * scale, gradient, ctx.mix)
            for estimate, gradient in zip(estimates, values or arriving, strict=True)
        ]
        fits = [
            fit_gradient(estimate, per_example(gradient, scale), ctx.examples) if want else None
            for estimate, gradient, want in zip(
                estimates, arriving, ctx.needs_input_grad[5 + count : 5 + 2 * count], strict=True
            )
        ]
        guesses = [fit_gradient(*pair, ctx.examples) for pair in zip(imagined, values, strict=True)]
        return None, None, None, None, None, *synthetic, *fits, *guesses


def swap_gradients(
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    examples: int,
    mean: bool = True,
    mix: float = 0.0,
    imagined: Sequence[Tensor] = (),
    boundary: str = "",
) -> tuple[Tensor, ...]:
    """Return the values, or synthetic inputs; backward, swap the arriving gradients for the estimates and fit the models.

    Args:
        values: The values that cross a boundary.
        estimates: The estimator's answers, per example.
        examples: Number of examples.
        mean: Whether the loss averages over examples.
        mix: Share of the arriving gradient in what the values receive; 0 where there are synthetic inputs.
        imagined: Synthetic inputs, which pass forward in place of the values.
        boundary: The boundary's name, for the error of a second derivative.
    """
    given = boundary, examples, mean, mix, len(values)
    swapped: tuple[Tensor, ...] = GradientSwap.apply(*given, *values, *estimates, *imagined)  # type: ignore[no-untyped-call]
    return swapped


def mixed(estimate: Tensor, arriving: Tensor, mix: float) -> Tensor:
    """Return what a producer receives: the estimate, the arriving gradient (mix 1), or some of each, in the latter's dtype."""
    if mix == 0:
        return estimate.to(arriving.dtype)
    return arriving if mix == 1 else ((1 - mix) * estimate + mix * arriving).to(arriving.dtype)


class GradientLeak(torch.autograd.Function):
    """Passes a value forward, and back the gradient that flows into it, weighted."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        """Return the value."""
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Weight the gradient."""
        return gradient * ctx.weight, None


def leak_gradient(value: Tensor, weight: float, examples: int, mean: bool = True) -> Tensor:
    """Return a value for an estimator whose own loss flows back into it: ``weight`` times the gradient of each example."""
    leaked: Tensor = GradientLeak.apply(value, weight if mean else weight * examples)  # type: ignore[no-untyped-call]
    return leaked
