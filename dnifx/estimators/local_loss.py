"""Decoupled greedy learning: the true gradient of a local loss."""

from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from dnifx.estimators.base import BoundarySpec, Factory
from dnifx.estimators.head import Head
from dnifx.estimators.labelled import ExampleLoss, LabelledGradient, label_loss, need_context, uncompiled
from dnifx.runtime.emitted.gradients import own_gradients

fx.wrap("own_gradients")


@dataclass(frozen=True)
class LocalLoss:
    """Answers with the gradient of an auxiliary classifier's loss, and trains the classifier on that loss.

    g = d l(a(h), y) / dh, where a is the head, y the label and l the loss of an example. The parameters of a minimise
    l(a(h), y). Where each token or pixel has a label, an example's loss is the mean over its positions. Partitions
    further behind are not needed: no target is computed, and the producer and its head learn alone.

    Args:
        head: Builds the classifier from the boundary's spec: a module that takes the values, and the mask if there is
            one, and returns logits [batch, classes].
        loss: Takes logits and one-hot labels, both [batch, classes], and returns one loss for each example, [batch].

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
        Belilovsky, Eickenberg, Oyallon 2019, "Greedy layerwise learning can scale to ImageNet", and 2020, "Decoupled
        greedy learning of CNNs", ICML: min over theta_j, gamma_j of l(y, a_j(f_j(h_{j-1}))).

    Differs from the paper in: the default head is linear over 2 x 2 averages, without convolutions. There is no replay
    buffer.
    """

    head: Factory = field(default=Head())
    loss: ExampleLoss = label_loss

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        need_context("LocalLoss", spec)
        return LocalGradient(self.head(spec), self.loss)


class LocalGradient(LabelledGradient):
    """Differentiates the loss of a head."""

    needs_target = False

    @uncompiled
    def forward(
        self, values: tuple[Tensor, ...], context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the gradient of each example's own loss with respect to each value."""
        leaves, losses = self.losses(values, context, mask)
        gradients = own_gradients(losses, leaves, parameters=tuple(self.parameters()))
        return tuple(gradients[index] for index in range(len(leaves)))
