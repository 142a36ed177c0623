"""What estimators take from the end of the model: the output's error, and the loss of each example."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.derivatives import differentiable_once
from dnifx.runtime.emitted.fitting import count_only, example_weight, fit_gradient, per_example


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
        *tensors: Tensor,
    ) -> Tensor:
        """Take the output, then the values of each estimator's boundary; return the output."""
        ctx.boundary, ctx.estimators, ctx.scale, ctx.mask = boundary, estimators, example_weight(examples, mean), mask
        ctx.save_for_backward(*tensors[1:])
        return tensors[0].view_as(tensors[0])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the error through, and give every value its synthetic gradient."""
        error, values = per_example(arriving[0], ctx.scale), list(ctx.saved_tensors)
        synthetic: list[Tensor] = []
        for estimator, count in ctx.estimators:
            given = values[len(synthetic) : len(synthetic) + count]
            seen = tuple(value if ctx.mask is None else count_only(value, ctx.mask) for value in given)
            for estimate, value in zip(estimator(seen, error), given, strict=True):
                counted = estimate if ctx.mask is None else count_only(estimate, ctx.mask)
                synthetic.append((counted * ctx.scale).to(value.dtype))
        return None, None, None, None, None, arriving[0], *synthetic


def feed_back(
    output: Tensor,
    boundaries: Sequence[Sequence[Tensor]],
    estimators: Sequence[Any],
    examples: int,
    mean: bool = True,
    mask: Tensor | None = None,
    boundary: str = "",
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
    """
    asked = [(estimator, len(values)) for estimator, values in zip(estimators, boundaries, strict=True)]
    tensors = [value for values in boundaries for value in values]
    passed: Tensor = OutputError.apply(asked, boundary, examples, mean, mask, output, *tensors)  # type: ignore[no-untyped-call]
    return passed


class LossLesson(torch.autograd.Function):
    """Passes outputs forward; backward, fits predictions of the loss to the loss of each example."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take so many outputs, then the predictions, [batch] each; return the outputs."""
        ctx.save_for_backward(losses, *tensors[count:])
        return tuple(output.view_as(output) for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the gradients through, and turn the losses into the predictions' fit gradients."""
        losses, *predictions = ctx.saved_tensors
        return None, None, *arriving, *(fit_gradient(each.detach(), losses, len(losses)) for each in predictions)


def tell_losses(outputs: Sequence[Any], predictions: Sequence[Tensor], losses: Tensor) -> tuple[Any, ...]:
    """Return the outputs; in the backward pass, predictions of the loss of each example, [batch], are fitted to it."""
    taught = [each for each in predictions if each.requires_grad]
    places = [place for place, each in enumerate(outputs) if isinstance(each, Tensor) and each.requires_grad]
    carried = [outputs[place] for place in places]
    passed = LossLesson.apply(losses, len(carried), *carried, *taught)  # type: ignore[no-untyped-call]
    found = dict(zip(places, passed, strict=True))
    return tuple(found.get(place, each) for place, each in enumerate(outputs))


def scheduled_alone(values: Sequence[Tensor], boundary: str) -> tuple[Tensor, ...]:
    """Return the values of a boundary whose estimator needs what only a training step sees.

    Raises:
        RuntimeError: Autograd records.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the estimator of boundary {boundary!r} needs the loss or the output's error, which this forward does not see; train "
            "with Trainer.step, and evaluate under torch.no_grad()"
        )
    return tuple(values)
