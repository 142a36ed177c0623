"""The interface nodes: what runs on a cut in the fused graph. Emitted packages carry a copy of this and of what it imports."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import arriving_fit, example_weight, fit_gradient, magnitude, wide
from dnifx.runtime.emitted.loss_scale import Factor, Scale, factor_of
from dnifx.runtime.emitted.recording import Recorder, present_recorder

OPTIONS = 10
"""How many arguments an interface node takes before its tensors."""


class GradientSwap(torch.autograd.Function):
    """Passes values forward; backward, gives them the synthetic gradient and gives the estimator its fit gradient.

    With per-example estimates g and arriving gradients t of n examples, where the loss sums (weight 1) or averages
    (weight 1/n) over examples and was multiplied by s: the values receive ``g * weight * s``, or ``(1 - mix) * g * weight * s +
    mix * t`` where some of the arriving gradient is mixed in; the estimates receive s times the gradient of the mean over examples
    of ||g - t / (weight * s)||^2 (Jaderberg et al. 2017, Section 2.2).

    Synthetic inputs, where there are any, pass forward in place of the values and are fitted to them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        boundary: str,
        examples: int,
        mean: bool,
        mix: float,
        fit: str,
        fit_weight: float,
        loss_scale: Scale,
        told: bool,
        recorder: Recorder | None,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Take ``count`` values, as many estimates, and none or as many synthetic inputs; return what passes forward."""
        ctx.recorder, ctx.recorded = recorder, () if recorder is None else tensors[:count]
        ctx.boundary, ctx.examples, ctx.mean, ctx.mix, ctx.told, ctx.count = boundary, examples, mean, mix, told, count
        ctx.fit, ctx.fit_weight, ctx.loss_scale = fit, fit_weight, loss_scale
        values, imagined = tensors[:count], tensors[2 * count :]
        ctx.save_for_backward(*tensors[count:], *(values if imagined else ()))
        return passed_on(ctx, imagined or values)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        """Give the values the estimates; give estimates and synthetic inputs their fit gradients."""
        saved, count = ctx.saved_tensors, ctx.count
        estimates, imagined, values = saved[:count], saved[count : 2 * count], saved[2 * count :]
        gradients, told = gathered(ctx, arriving)
        if not gradients:
            return (None,) * len(ctx.needs_input_grad)
        scale, weight = factor_of(ctx.loss_scale, told, gradients[0]), example_weight(ctx.examples, ctx.mean)
        synthetic = [
            mixed(scaled(estimate.detach(), weight, scale), gradient, ctx.mix)
            for estimate, gradient in zip(estimates, values or gradients, strict=True)
        ]
        if ctx.recorder is not None:
            ctx.recorder.see(ctx.boundary, ctx.recorded, estimates, gradients, weight, scale)
            ctx.recorded = ()
        wanted = ctx.needs_input_grad[OPTIONS + count : OPTIONS + 2 * count]
        fits = [
            arriving_fit(estimate, gradient, ctx.examples, weight, scale, ctx.fit, ctx.fit_weight) if want else None
            for estimate, gradient, want in zip(estimates, gradients, wanted, strict=True)
        ]
        pairs = zip(imagined, values, strict=True)
        guesses = [fit_gradient(guess, value, ctx.examples) * magnitude(scale) for guess, value in pairs]
        return *(None,) * OPTIONS, *synthetic, *fits, *guesses


def passed_on(ctx: Any, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what passes an interface node, and where ``ctx.told`` one more value, to which the factor of the loss comes."""
    passed = tuple(value.view_as(value) for value in values)
    if not ctx.told:
        return passed
    ctx.set_materialize_grads(False)
    ctx.kinds = tuple((value.shape, value.dtype, value.device) for value in values)
    return *passed, wide(values[0].new_zeros(()))


def gathered(ctx: Any, arriving: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor | None]:
    """Return the gradients that arrived at an interface node, zero for single values without one, and the factor of the loss.

    The list is empty where no gradient arrived at all: the loss does not depend on the values.
    """
    if not ctx.told:
        return [gradient for gradient in arriving if gradient is not None], None
    *found, told = arriving
    if all(gradient is None for gradient in found):
        return [], told
    pairs = zip(found, ctx.kinds, strict=True)
    return [
        torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
        for gradient, (shape, dtype, device) in pairs
    ], told


def swap_gradients(
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    examples: int,
    mean: bool = True,
    mix: float = 0.0,
    imagined: Sequence[Tensor] = (),
    boundary: str = "",
    fit: str = "squared",
    fit_weight: float = 1.0,
    loss_scale: Scale = None,
    told: bool = False,
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
        fit: What arrives at the estimates; see ``arriving_fit``.
        fit_weight: Weight of an absolute error.
        loss_scale: What the loss is multiplied by before its backward pass.
        told: Whether one more value is returned, to which that factor comes as its gradient; see ``tell_factor``.
    """
    given = boundary, examples, mean, mix, fit, fit_weight, loss_scale, told, present_recorder(), len(values)
    swapped: tuple[Tensor, ...] = GradientSwap.apply(*given, *values, *estimates, *imagined)  # type: ignore[no-untyped-call]
    return swapped


def scaled(estimate: Tensor, weight: float, scale: Factor) -> Tensor:
    """Return an estimate times the weight of an example and the loss scale."""
    if isinstance(scale, float | int):
        return (estimate if scale == 1 else wide(estimate)) * (weight * scale)
    precise = wide(estimate)
    return precise * (scale.to(precise.dtype) * weight)


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
