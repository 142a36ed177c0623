"""Decoupled greedy learning: the true gradient of a loss of one's own."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.nn import functional

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, Factory, GradientEstimator
from dnifx.estimators.head import Head
from dnifx.runtime.gradients import leaf, own_gradients

fx.wrap("leaf")
fx.wrap("own_gradients")

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits [batch, classes] and one-hot labels [batch, classes] to one loss an example, [batch]."""


def label_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return the cross entropy of each example, [batch], between logits and one-hot labels, both [batch, classes]."""
    return functional.cross_entropy(logits, label.to(logits.dtype), reduction="none")


@dataclass(frozen=True)
class LocalLoss:
    """Answers with the gradient of an auxiliary classifier's loss, and trains the classifier on that loss.

    g = d l(a(h), y) / dh and a's parameters follow d l(a(h), y), with a the head, y the label and l the loss of an example.
    Nothing is asked of the partitions behind: no target is computed, so a producer and its head learn without any of them.

    Args:
        head: Builds the classifier from the boundary's spec: values -> logits [batch, classes].
        loss: From logits and one-hot labels, both [batch, classes], to one loss an example, [batch].

    Raises:
        EstimatorError: There is no context to learn from.

    Example:
        >>> import torch
        >>> from dnifx.estimators import BoundarySpec
        >>> from dnifx.ir import TensorSpec
        >>> spec = BoundarySpec("layer", (TensorSpec((1, 2), torch.float32),), context=2, classes=2)
        >>> estimator = LocalLoss()(spec)
        >>> _ = estimator.head.layers[0].weight.data.copy_(torch.eye(2))
        >>> estimator((torch.zeros(1, 2),), torch.tensor([[1.0, 0.0]]))[0].tolist()  # softmax - label
        [[-0.5, 0.5]]

    References:
        Belilovsky, Eickenberg, Oyallon 2019, "Greedy layerwise learning can scale to ImageNet" and 2020, "Decoupled greedy
        learning of CNNs", ICML: min over theta_j, gamma_j of l(y, a_j(f_j(h_{j-1}))).

    Differs from the paper in: the default head is linear over 2 x 2 averages, without convolutions; there is no replay buffer.
    """

    head: Factory = field(default=Head())
    loss: ExampleLoss = label_loss

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        need_context("LocalLoss", spec)
        return LocalGradient(self.head(spec), self.loss)


def need_context(name: str, spec: BoundarySpec) -> None:
    """Raise EstimatorError where a boundary's estimator would see no label."""
    if spec.context is None:
        raise EstimatorError(
            f"boundary {spec.name!r}: {name} learns from labels; give dnifx.decouple(..., context='label', num_classes=...)"
        )


class LocalGradient(GradientEstimator):
    """Differentiates the loss of a head."""

    needs_target = False

    def __init__(self, head: nn.Module, loss: ExampleLoss) -> None:
        super().__init__()
        self.head = head
        self.loss = loss

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the gradient of each example's own loss with respect to each value."""
        if context is None:
            raise EstimatorError("a local loss was asked without labels")
        leaves = tuple(leaf(value) for value in values)
        gradients = own_gradients(self.loss(self.head(leaves), context), leaves)
        return tuple(gradients[index] for index in range(len(leaves)))
