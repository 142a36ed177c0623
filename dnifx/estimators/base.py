"""What a gradient estimator is: the contract of every estimator on a boundary."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.ir import TensorSpec


@dataclass(frozen=True)
class BoundarySpec:
    """What an estimator is built from.

    Attributes:
        name: The boundary's name, for error texts.
        values: Specs of the boundary's values, batch dimension first.
        context: Width of the context features, or None if estimators see no context.
        classes: Number of classes if the context is a label.
        output: Spec of the model's output, or None if that is not one tensor.
        batch: Number of examples in the example inputs. A value whose first size differs has no batch dimension.
        names: Names of the values' graph nodes, for error texts.
        routed: Places of the values whose first size the data decide, as where a router picks rows. Their rows are no examples.
        flops: FLOPs of the partition that makes the values, for the example inputs, shared among its boundaries; None if unknown.
    """

    name: str
    values: tuple[TensorSpec, ...]
    context: int | None = None
    classes: int | None = None
    output: TensorSpec | None = None
    batch: int | None = None
    names: tuple[str, ...] = ()
    routed: frozenset[int] = frozenset()
    flops: int | None = None


class GradientEstimator(nn.Module, ABC):
    """Answers, at once, with the gradient that the loss will have with respect to the values of a boundary.

    Estimates and targets are per example: each is the gradient of the example's own loss. They depend neither on the
    batch size nor on how the loss is reduced over the batch.
    """

    locked: bool = False
    """Whether the producer waits for the target and uses it instead of the estimate."""

    late: int = 0
    """Steps by which the true gradient comes late, for a backward pass of the step that it belongs to; needs ``locked``."""

    mix: float = 0.0
    """Share of the target in what the producer receives; above 0 the producer waits for it."""

    prop: float = 0.0
    """Weight of the gradient of the estimator's own loss in what the producer receives; above 0 the producer waits."""

    needs_target: bool = True
    """Whether the estimator learns from the target. One that does not is fitted to the loss (as Critic), or its own
    backward ignores what arrives and lowers a loss of its own (as LocalLoss)."""

    fit: Literal["squared", "absolute", "average"] = "squared"
    """What arrives at the estimates in the backward pass, times the loss scale: the gradient of the mean over examples of the
    squared error, or of the absolute error. ``"average"`` is that of the squared error in units of the true loss, for an estimator
    that moves an average of its own. Where no target is needed, the loss scale itself arrives in every entry."""

    fit_weight: float = 1.0
    """What an absolute error is multiplied by."""

    needs_loss: bool = False
    """Whether it predicts the loss. Then ``forward`` returns one more tensor [batch] after the estimates, which is fitted
    to the loss of each example."""

    needs_error: bool = False
    """Whether it answers from the error. Then its context is the gradient [batch, ...] of each example's loss with respect
    to the model's output, and the producer waits for it."""

    needs_mask: bool = False
    """Whether it looks at the tokens of an example together. Then ``forward`` takes the mask [batch, length], if there is
    one, as a third argument. Other estimators see zeros in place of padding."""

    by_pixel: bool = False
    """Whether its context is one for each pixel, [batch, height, width, features]."""

    @abstractmethod
    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value, of the value's shape.

        Args:
            values: The boundary's values [batch, ...], detached. They are zero where a mask says that a token does not count.
            context: Context features [batch, width] or [batch, length, width], if there is a context.
        """


Factory = Callable[[BoundarySpec], nn.Module]
"""Builds the estimator (or the input model) of one boundary from the boundary's spec."""


def need_features(who: str, spec: BoundarySpec, remedy: str) -> None:
    """Raise EstimatorError unless every value is a floating-point vector, sequence of tokens or image."""
    for value in spec.values:
        if len(value.shape) not in (2, 3, 4) or not value.dtype.is_floating_point:
            raise EstimatorError(
                f"boundary {spec.name!r}: {who} takes floating-point values [batch, features], [batch, length, features] or "
                f"[batch, channels, height, width], got {value}; {remedy}"
            )
