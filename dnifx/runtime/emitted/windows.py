"""The two ends of a recurrent model's window: states, the gradients that they receive, and the estimators' targets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import arriving_fit, example_weight, fit_gradient, per_example, wide
from dnifx.runtime.emitted.interface import gathered, passed_on, scaled
from dnifx.runtime.emitted.loss_scale import Factor, Scale, factor_of


class WindowStart(torch.autograd.Function):
    """Passes a window's first state forward; backward, fits the estimator to what arrives.

    Rows that begin an episode are zeroed. With per-example estimates g of the state as the last window left it, and arriving
    gradients t of n examples, the estimates receive the gradient of the mean over examples of ||g - t / scale||^2. There t
    is exactly 0 for a row that begins an episode: no later loss depends on the state that was left.

    The state receives ``back * (t - g * scale)``. The window before gave it the estimate; this replaces the share ``back`` of
    that by what arrived. Where ``back`` is 0 the caller has detached the state, which receives nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        boundary: str,
        reset: Tensor | None,
        dims: tuple[int, ...],
        examples: int,
        mean: bool,
        back: float,
        fit: str,
        fit_weight: float,
        loss_scale: Scale,
        told: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Take the state's values and as many estimates; return the values."""
        count = len(tensors) // 2
        ctx.boundary, ctx.reset, ctx.dims, ctx.back, ctx.told = boundary, reset, dims, back, told
        ctx.examples, ctx.weight = examples, example_weight(examples, mean)
        ctx.fit, ctx.fit_weight, ctx.loss_scale = fit, fit_weight, loss_scale
        ctx.save_for_backward(*tensors[count:])
        pairs = zip(tensors[:count], dims, strict=True)
        return passed_on(ctx, tuple(without_rows(value, reset, dim) for value, dim in pairs))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        """Return the estimates' fit gradients, and what the gradient of the window before still lacks."""
        estimates = ctx.saved_tensors
        gradients, told = gathered(ctx, arriving)
        if not gradients:
            return (None,) * len(ctx.needs_input_grad)
        scale = factor_of(ctx.loss_scale, told, gradients[0])
        wanted = ctx.needs_input_grad[10 + len(estimates) :]
        seen = at_start(gradients, ctx.reset, ctx.dims)
        given = ctx.examples, ctx.weight, scale, ctx.fit, ctx.fit_weight
        fits = [
            arriving_fit(estimate, gradient, *given) if want else None
            for estimate, gradient, want in zip(estimates, seen, wanted, strict=True)
        ]
        lacking = [
            like_state((wide(gradient) - scaled(estimate, ctx.weight, scale)) * ctx.back, value, dim)
            if ctx.back
            else None
            for estimate, gradient, value, dim in zip(estimates, seen, gradients, ctx.dims, strict=True)
        ]
        return *(None,) * 10, *lacking, *fits


class WindowEnd(torch.autograd.Function):
    """Passes a window's outputs forward; backward, gives the weighted estimates to the state that the window leaves."""

    @staticmethod
    def forward(
        ctx: Any,
        boundary: str,
        outputs: int,
        dims: tuple[int, ...],
        weight: float,
        loss_scale: Scale,
        told: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Take the outputs, the state's values and as many estimates; return the outputs."""
        ctx.boundary, ctx.dims, ctx.weight, ctx.loss_scale, ctx.told = boundary, dims, weight, loss_scale, told
        ctx.save_for_backward(*tensors[outputs:])
        return passed_on(ctx, tensors[:outputs])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        """Let the outputs' gradients through, and give the state its synthetic gradient."""
        values, estimates = ctx.saved_tensors[: len(ctx.dims)], ctx.saved_tensors[len(ctx.dims) :]
        through, told = (arriving[:-1], arriving[-1]) if ctx.told else (arriving, None)
        scale = factor_of(ctx.loss_scale, told, values[0])
        synthetic = [
            like_state(scaled(estimate.detach(), ctx.weight, scale), value, dim)
            for estimate, value, dim in zip(estimates, values, ctx.dims, strict=True)
        ]
        return *(None,) * 6, *through, *synthetic, *(None for _ in estimates)


def start_window(
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    reset: Tensor | None,
    dims: Sequence[int],
    examples: int,
    mean: bool = True,
    back: float = 0.0,
    boundary: str = "",
    fit: str = "squared",
    fit_weight: float = 1.0,
    loss_scale: Scale = None,
    told: bool = False,
) -> tuple[Tensor, ...]:
    """Return the state that a window starts from; in the backward pass, fit the estimator to what arrives there.

    Args:
        values: The state as the last window left it, detached if ``back`` is 0.
        estimates: The estimator's answer to it, [batch, ...] each.
        reset: Which examples begin an episode, [batch], or None.
        dims: The dimension of each value that counts examples.
        examples: Number of examples.
        mean: Whether the loss averages over examples.
        back: Share of the estimate that what arrives replaces.
        boundary: The boundary's name, for the error of a second derivative.
        fit: What arrives at the estimates; see ``arriving_fit``.
        fit_weight: Weight of an absolute error.
        loss_scale: What the loss is multiplied by before its backward pass.
        told: Whether one more value is returned, to which that factor comes as its gradient; see ``tell_factor``.
    """
    given = boundary, reset, tuple(dims), examples, mean, back, fit, fit_weight, loss_scale, told
    started: tuple[Tensor, ...] = WindowStart.apply(*given, *values, *estimates)  # type: ignore[no-untyped-call]
    return started


def end_window(
    outputs: Sequence[Tensor],
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    dims: Sequence[int],
    scale: float,
    examples: int,
    mean: bool = True,
    boundary: str = "",
    loss_scale: Scale = None,
    told: bool = False,
) -> tuple[Tensor, ...]:
    """Return a window's outputs; in the backward pass, the state that it leaves receives the estimates times ``scale``."""
    weight = scale * example_weight(examples, mean)
    given = boundary, len(outputs), tuple(dims), weight, loss_scale, told
    ended: tuple[Tensor, ...] = WindowEnd.apply(*given, *outputs, *values, *estimates)  # type: ignore[no-untyped-call]
    return ended


def window_targets(
    arriving: Sequence[Tensor], reset: Tensor | None, dims: Sequence[int], scale: float
) -> tuple[Tensor, ...]:
    """Return the per-example targets, [batch, ...], from the gradients that arrived at a window's first state."""
    return tuple(per_example(gradient, scale) for gradient in at_start(arriving, reset, dims))


def at_start(arriving: Sequence[Tensor], reset: Tensor | None, dims: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the gradients that arrived at a window's first state, [batch, ...], zero where an episode began."""
    pairs = zip(arriving, dims, strict=True)
    return tuple(by_example(without_rows(gradient, reset, dim), dim) for gradient, dim in pairs)


def by_example(value: Tensor, dim: int) -> Tensor:
    """Return a value of a state as estimators see it: [batch, features], or [batch, channels, height, width]."""
    moved = value.movedim(dim, 0) if dim else value
    return moved if moved.dim() in (2, 4) else moved.reshape(moved.size(0), -1)


def like_state(estimate: Tensor, value: Tensor, dim: int) -> Tensor:
    """Undo ``by_example``: return an estimate in the shape and dtype of the state's value."""
    moved = estimate.reshape(value.movedim(dim, 0).shape).to(value.dtype)
    return moved.movedim(0, dim) if dim else moved


def without_rows(value: Tensor, reset: Tensor | None, dim: int) -> Tensor:
    """Return a value with the rows of the given examples, [batch], zeroed."""
    if reset is None:
        return value
    shape = [1] * value.dim()
    shape[dim] = -1
    return torch.where(reset.view(shape), torch.zeros_like(value), value)


def answers_at(estimator: Any, values: Sequence[Tensor], dims: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the estimator's answers to a state, without a graph."""
    with torch.no_grad():
        seen = tuple(by_example(value.detach(), dim) for value, dim in zip(values, dims, strict=True))
        answers: tuple[Tensor, ...] = estimator(seen)
    return answers


def window_gradients(
    estimator: Any, values: Sequence[Tensor], dims: Sequence[int], weight: float
) -> tuple[Tensor, ...]:
    """Return what the state that a window leaves receives: the estimates times ``weight``, in the values' own shapes."""
    estimates = answers_at(estimator, values, dims)
    return tuple(
        like_state(estimate * weight, value, dim) for estimate, value, dim in zip(estimates, values, dims, strict=True)
    )


def auxiliary_fit(
    head: Any,
    estimator: Any,
    start: Sequence[Tensor],
    values: Sequence[Tensor],
    dims: Sequence[int],
    reset: Tensor | None,
    examples: int,
    factor: Factor = 1.0,
) -> None:
    """Fit the head, and the core that made the window's first state, to the synthetic gradient at the window's end.

    The loss is the mean over examples of ||head(start) - estimate at the end||^2. Rows that begin an episode have no loss.

    Args:
        head: Predicts, from the first state, the estimator's answer to the last.
        estimator: The estimator.
        start: The first state as estimators see it, attached to the core.
        values: The state that the window leaves.
        dims: The dimension of each of its tensors that counts examples.
        reset: Which examples begin an episode, [batch], or None.
        examples: Number of examples.
        factor: What the fit is multiplied by, as the loss is.
    """
    targets, made = answers_at(estimator, values, dims), head(tuple(start))
    fits = tuple(
        without_rows(fit_gradient(one.detach(), target * factor, examples, loss_scale=factor), reset, 0)
        for one, target in zip(made, targets, strict=True)
    )
    torch.autograd.backward(tuple(made), fits, retain_graph=True)
