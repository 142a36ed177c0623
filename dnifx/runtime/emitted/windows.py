"""The two ends of a recurrent model's window: states, the gradients that they receive, and the estimators' targets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import example_weight, fit_gradient, per_example


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
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Take the state's values and as many estimates; return the values."""
        count = len(tensors) // 2
        ctx.boundary, ctx.reset, ctx.dims, ctx.examples, ctx.mean, ctx.back = (
            boundary,
            reset,
            dims,
            examples,
            mean,
            back,
        )
        ctx.save_for_backward(*tensors[count:])
        return tuple(
            without_rows(value, reset, dim).view_as(value) for value, dim in zip(tensors[:count], dims, strict=True)
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Return the estimates' fit gradients, and what the gradient of the window before still lacks."""
        estimates = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6 + len(estimates) :]
        scale = example_weight(ctx.examples, ctx.mean)
        targets = window_targets(arriving, ctx.reset, ctx.dims, scale)
        fits = [
            fit_gradient(estimate, target, ctx.examples) if want else None
            for estimate, target, want in zip(estimates, targets, wanted, strict=True)
        ]
        lacking = [
            like_state((target - estimate) * (ctx.back * scale), gradient, dim) if ctx.back else None
            for estimate, target, gradient, dim in zip(estimates, targets, arriving, ctx.dims, strict=True)
        ]
        return None, None, None, None, None, None, *lacking, *fits


class WindowEnd(torch.autograd.Function):
    """Passes a window's outputs forward; backward, gives the weighted estimates to the state that the window leaves."""

    @staticmethod
    def forward(
        ctx: Any, boundary: str, outputs: int, dims: tuple[int, ...], weight: float, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Take the outputs, the state's values and as many estimates; return the outputs."""
        ctx.boundary, ctx.outputs, ctx.dims, ctx.weight = boundary, outputs, dims, weight
        ctx.save_for_backward(*tensors[outputs:])
        return tuple(output.view_as(output) for output in tensors[:outputs])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the outputs' gradients through, and give the state its synthetic gradient."""
        values, estimates = ctx.saved_tensors[: len(ctx.dims)], ctx.saved_tensors[len(ctx.dims) :]
        synthetic = [
            like_state(estimate.detach() * ctx.weight, value, dim)
            for estimate, value, dim in zip(estimates, values, ctx.dims, strict=True)
        ]
        return None, None, None, None, *arriving, *synthetic, *(None for _ in estimates)


def start_window(
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    reset: Tensor | None,
    dims: Sequence[int],
    examples: int,
    mean: bool = True,
    back: float = 0.0,
    boundary: str = "",
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
    """
    started: tuple[Tensor, ...] = WindowStart.apply(
        boundary, reset, tuple(dims), examples, mean, back, *values, *estimates
    )  # type: ignore[no-untyped-call]
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
) -> tuple[Tensor, ...]:
    """Return a window's outputs; in the backward pass, the state that it leaves receives the estimates times ``scale``."""
    weight = scale * example_weight(examples, mean)
    given = boundary, len(outputs), tuple(dims), weight
    ended: tuple[Tensor, ...] = WindowEnd.apply(*given, *outputs, *values, *estimates)  # type: ignore[no-untyped-call]
    return ended


def window_targets(
    arriving: Sequence[Tensor], reset: Tensor | None, dims: Sequence[int], scale: float
) -> tuple[Tensor, ...]:
    """Return the per-example targets, [batch, ...], from the gradients that arrived at a window's first state."""
    return tuple(
        per_example(by_example(without_rows(gradient, reset, dim), dim), scale)
        for gradient, dim in zip(arriving, dims, strict=True)
    )


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
    """
    targets, made = answers_at(estimator, values, dims), head(tuple(start))
    fits = tuple(
        without_rows(fit_gradient(one.detach(), target, examples), reset, 0)
        for one, target in zip(made, targets, strict=True)
    )
    torch.autograd.backward(tuple(made), fits, retain_graph=True)
