"""What a gradient estimator is: the contract that every interface holds to."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

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
        context_dims: Number of dimensions of the context features (2 for one vector an example, 3 for one a token).
    """

    name: str
    values: tuple[TensorSpec, ...]
    context: int | None = None
    classes: int | None = None
    context_dims: int = 2


class GradientEstimator(nn.Module, ABC):
    """Answers, at once, with the gradient that the loss will have with respect to the values of a boundary.

    Estimates and targets are per example: the gradient of the example's own loss, whatever the batch size and whatever the
    reduction of the loss over the batch.
    """

    locked: ClassVar[bool] = False
    """Whether the producer has to wait for the target and uses it instead of the estimate."""

    @abstractmethod
    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value, of the value's shape.

        Args:
            values: The boundary's values, detached; [batch, ...] each.
            context: Context features [batch, width] or [batch, length, width], where there is a context.
        """


Factory = Callable[[BoundarySpec], nn.Module]
"""Builds the estimator (or the input model) of one boundary from the boundary's spec."""
