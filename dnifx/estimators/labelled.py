"""What estimators that classify have in common: a head, labels, and a loss of each example."""

from collections.abc import Callable

from torch import Tensor, fx, nn
from torch.nn import functional

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator
from dnifx.estimators.head import PooledHead
from dnifx.runtime.emitted.compiling import outside_graphs
from dnifx.runtime.emitted.gradients import labelled_rows, leaf, position_mean

fx.wrap("labelled_rows")
fx.wrap("leaf")
fx.wrap("position_mean")

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits and one-hot labels, both [rows, classes], to one loss a row, [rows]. A row is an example, or a position of one
where tokens or pixels have labels of their own."""


def label_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return the cross entropy of each example, [batch], between logits and one-hot labels, both [batch, classes]."""
    return functional.cross_entropy(logits, label.to(logits.dtype), reduction="none")


def need_context(name: str, spec: BoundarySpec) -> None:
    """Raise EstimatorError where a boundary's estimator would see no label."""
    if spec.context is None:
        raise EstimatorError(
            f"boundary {spec.name!r}: {name} learns from labels; give dnifx.decouple(..., context='label', num_classes=...)"
        )


uncompiled = outside_graphs("the estimator differentiates a loss of its own")
"""Makes ``torch.compile`` run a forward outside its graphs."""


class LabelledGradient(GradientEstimator):
    """Differentiates the loss that a head has on its own.

    Args:
        head: From values, and the mask of tokens where there is one, to logits [batch, classes].
        loss: From logits and labels to the loss of each example, [batch].
    """

    needs_mask = True

    def __init__(self, head: nn.Module, loss: ExampleLoss) -> None:
        super().__init__()
        self.head = head
        self.loss = loss
        self.by_pixel = isinstance(head, PooledHead) and head.pool is None

    def losses(
        self, values: tuple[Tensor, ...], context: Tensor | None, mask: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the values to differentiate with respect to, and the loss of each example, [batch].

        Raises:
            EstimatorError: There are no labels.
        """
        if context is None:
            raise EstimatorError(
                f"{type(self).__name__} was asked without labels; give dnifx.decouple(..., context='label')"
            )
        leaves = tuple(leaf(value) for value in values)
        if isinstance(self.head, PooledHead):
            logits = self.head(leaves, mask, context)
        else:
            logits = self.head(leaves) if mask is None else self.head(leaves, mask)
        rows = labelled_rows(logits, context)
        return leaves, position_mean(self.loss(rows[0], rows[1]), context, mask)
