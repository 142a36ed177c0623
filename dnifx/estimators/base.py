"""What a gradient estimator is: the contract that every interface holds to."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dnifx.ir import TensorSpec


@dataclass(frozen=True)
class BoundarySpec:
    """What an estimator is built from.

    Attributes:
        name: The boundary's name, for error texts.
        values: Specs of the boundary's values, batch dimension first.
        context: Width of the context features, or None where estimators see no context.
        classes: Number of classes where the context is a label.
        output: Spec of the model's output, or None where that is not one tensor.
        batch: Number of examples in the example inputs; a value of another first size has no batch dimension there.
        names: Names of the values' graph nodes, for error texts.
    """

    name: str
    values: tuple[TensorSpec, ...]
    context: int | None = None
    classes: int | None = None
    output: TensorSpec | None = None
    batch: int | None = None
    names: tuple[str, ...] = ()


class GradientEstimator(nn.Module, ABC):
    """Answers, at once, with the gradient that the loss will have with respect to the values of a boundary.

    Estimates and targets are per example: the gradient of the example's own loss, whatever the batch size and whatever the
    reduction of the loss over the batch.
    """

    locked: bool = False
    """Whether the producer waits for the target and uses it instead of the estimate."""

    mix: float = 0.0
    """Share of the target in what the producer receives; above 0 the producer waits for it."""

    prop: float = 0.0
    """Weight of the gradient of the estimator's own loss in what the producer receives; above 0 the producer waits."""

    needs_target: bool = True
    """Whether the estimator learns from the target. One that does not takes its fit gradient from nowhere: its own backward
    ignores what arrives (as LocalLoss), or it is fitted to the loss (as Critic)."""

    needs_loss: bool = False
    """Whether it predicts the loss: ``forward`` then returns one more tensor [batch] after the estimates, which is fitted to
    the loss of each example."""

    needs_error: bool = False
    """Whether it answers from the error: its context is then the gradient [batch, ...] of each example's loss with respect to
    the model's output, for which the producer waits."""

    needs_mask: bool = False
    """Whether it looks at the tokens of an example together: where there is a mask, ``forward`` takes it as a third argument,
    [batch, length]. Any other sees zeros where padding stands."""

    @abstractmethod
    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value, of the value's shape.

        Args:
            values: The boundary's values, detached; [batch, ...] each, zero where a mask says that a token does not count.
            context: Context features [batch, width] or [batch, length, width], where there is a context.
        """


Factory = Callable[[BoundarySpec], nn.Module]
"""Builds the estimator (or the input model) of one boundary from the boundary's spec."""
