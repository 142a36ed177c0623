"""What estimators take from the end of the model: the output's error, and the loss of each example."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import count_only, example_weight, fit_gradient, magnitude, per_example, wide
from dnifx.runtime.emitted.loss_scale import Scale, factor_of


class OutputError(torch.autograd.Function):
    """Passes the output forward; backward, asks the estimators that see its error, and gives values their answers."""

    @staticmethod
    def forward(
        ctx: Any,
        estimators: Sequence[tuple[Any, int]],
        boundary: str,
        examples: int,
        mean: bool,
        mask: Tensor | None,
        loss_scale: Scale,
        *tensors: Tensor,
    ) -> Tensor:
        """Take the output, then the values of each estimator's boundary; return the output."""
        ctx.boundary, ctx.estimators, ctx.mask, ctx.loss_scale = boundary, estimators, mask, loss_scale
        ctx.weight = example_weight(examples, mean)
        ctx.save_for_backward(*tensors[1:])
        return tensors[0].view_as(tensors[0])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the error through, and give every value its synthetic gradient."""
        weight = factor_of(ctx.loss_scale, None, arriving[0]) * ctx.weight
        error, values = per_example(arriving[0], weight), list(ctx.saved_tensors)
        synthetic: list[Tensor] = []
        for estimator, count in ctx.estimators:
            given = values[len(synthetic) : len(synthetic) + count]
            seen = tuple(value if ctx.mask is None else count_only(value, ctx.mask) for value in given)
            for estimate, value in zip(estimator(seen, error), given, strict=True):
                counted = estimate if ctx.mask is None else count_only(estimate, ctx.mask)
                synthetic.append((wide(counted) * weight).to(value.dtype))
        return *(None,) * 6, arriving[0], *synthetic


def feed_back(
    output: Tensor,
    boundaries: Sequence[Sequence[Tensor]],
    estimators: Sequence[Any],
    examples: int,
    mean: bool = True,
    mask: Tensor | None = None,
    boundary: str = "",
    loss_scale: Scale = None,
) -> Tensor:
    """Return the output; in the backward pass, estimators see its error and the values of boundaries receive their answers.

    Args:
        output: [batch, ...].
        boundaries: The values of each boundary; their consumers read them detached.
        estimators: One for each boundary. It takes the values and the error of each example, [batch, ...].
        examples: Number of examples.
        mean: Whether the loss averages over examples.
        mask: Which tokens count, [batch, length].
        boundary: The boundaries' names, for the error of a second derivative.
        loss_scale: What the loss is multiplied by before its backward pass.
    """
    asked = [(estimator, len(values)) for estimator, values in zip(estimators, boundaries, strict=True)]
    tensors = [value for values in boundaries for value in values]
    passed: Tensor = OutputError.apply(asked, boundary, examples, mean, mask, loss_scale, output, *tensors)  # type: ignore[no-untyped-call]
    return passed


class LossLesson(torch.autograd.Function):
    """Passes outputs forward; backward, fits predictions of the loss to the loss of each example."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, loss_scale: Scale, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take so many outputs, then the predictions, [batch] each; return the outputs."""
        ctx.loss_scale = loss_scale
        ctx.save_for_backward(losses, *tensors[count:])
        return tuple(output.view_as(output) for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the gradients through, and turn the losses into the predictions' fit gradients."""
        losses, *predictions = ctx.saved_tensors
        factor = factor_of(ctx.loss_scale, None, losses)
        fits = (fit_gradient(each.detach(), losses, len(losses)) * magnitude(factor) for each in predictions)
        return None, None, None, *arriving, *fits


def tell_losses(
    outputs: Sequence[Any], predictions: Sequence[Tensor], losses: Tensor, loss_scale: Scale = None
) -> tuple[Any, ...]:
    """Return the outputs; in the backward pass, predictions of the loss of each example, [batch], are fitted to it."""
    taught = [each for each in predictions if each.requires_grad]
    places = [place for place, each in enumerate(outputs) if isinstance(each, Tensor) and each.requires_grad]
    carried = [outputs[place] for place in places]
    passed = LossLesson.apply(losses, loss_scale, len(carried), *carried, *taught)  # type: ignore[no-untyped-call]
    found = dict(zip(places, passed, strict=True))
    return tuple(found.get(place, each) for place, each in enumerate(outputs))


def scheduled_alone(values: Sequence[Tensor], boundary: str) -> tuple[Tensor, ...]:
    """Return the values of a boundary whose estimator needs what only a training step sees.

    Raises:
        RuntimeError: Autograd records.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the estimator of boundary {boundary!r} needs what this forward does not see: the loss, the output's error, or gradients "
            "of earlier steps; train with Trainer.step, and evaluate under torch.no_grad()"
        )
    return tuple(values)
