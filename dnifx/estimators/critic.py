"""Critics: predict the loss, and answer with the prediction's gradient."""

from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from dnifx.estimators.base import BoundarySpec, Factory
from dnifx.estimators.head import Head
from dnifx.estimators.labelled import ExampleLoss, LabelledGradient, label_loss, need_context, uncompiled
from dnifx.runtime.emitted.gradients import absolute_fit, predicted_gradients

fx.wrap("predicted_gradients")
fx.wrap("absolute_fit")


@dataclass(frozen=True)
class Critic:
    """Predicts the loss of each example and answers with the gradient of that prediction.

    m(h, y) = l(p(h), y) with p a classifier; g = dm/dh; p's parameters follow d (m(h, y) - L)^2 with L the example's loss,
    which the training step tells once the last partition has run. It needs no target gradient.

    The trainer tells it each example's loss where ``loss=`` gives one an example (``reduction="none"``), which is what it
    learns well from; of a reduced loss it is told the batch mean. A fused forward is told the target, ``net(x, context=y,
    target=y)``, and computes the module's ``loss=`` for it.

    Args:
        head: Builds p from the boundary's spec: values, and the mask where there is one -> logits [batch, classes].
        loss: l, from logits and one-hot labels, both [batch, classes], to one loss an example, [batch].

    Raises:
        EstimatorError: There is no context to predict from.

    Example:
        >>> import torch
        >>> from dnifx.estimators import BoundarySpec
        >>> from dnifx.ir import TensorSpec
        >>> spec = BoundarySpec("layer", (TensorSpec((1, 2), torch.float32),), context=2, classes=2)
        >>> estimator = Critic()(spec)
        >>> _ = estimator.head.layers[0].weight.data.copy_(torch.eye(2))
        >>> gradient, loss = estimator((torch.zeros(1, 2),), torch.tensor([[1.0, 0.0]]))
        >>> gradient.tolist(), [round(each, 4) for each in loss.tolist()]
        ([[-0.5, 0.5]], [0.6931])

    References:
        Czarnecki et al. 2017, "Sobolev Training for Neural Networks", NIPS, Section 4.3: the critic without the Sobolev term.

    Differs from the paper in: the loss is fitted by squared error; the default p is linear over 2 x 2 averages.
    """

    head: Factory = field(default=Head())
    loss: ExampleLoss = label_loss

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        need_context("Critic", spec)
        return CriticGradient(self.head(spec), self.loss)


class CriticGradient(LabelledGradient):
    """Differentiates a predicted loss.

    Args:
        head: From values, and the mask of tokens where there is one, to logits.
        loss: From logits and labels to the predicted loss of each example.
        sobolev: Weight of the fit of the gradients to the target, beside that of the loss; 0 fits the loss alone.
    """

    needs_loss = True

    def __init__(self, head: nn.Module, loss: ExampleLoss, sobolev: float = 0.0) -> None:
        super().__init__(head, loss)
        self.sobolev = sobolev
        self.needs_target = sobolev > 0

    @uncompiled
    def forward(
        self, values: tuple[Tensor, ...], context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the predicted loss with respect to each value, and the predicted losses, [batch]."""
        leaves, predicted = self.losses(values, context, mask)
        found = predicted_gradients(predicted, leaves, self.needs_target)
        gradients = tuple(found[index] for index in range(len(leaves)))
        if self.needs_target:
            gradients = tuple(absolute_fit(gradient, self.sobolev) for gradient in gradients)
        return *gradients, predicted
