"""Critics: they predict the loss, and answer with the gradient of the prediction."""

from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from dnifx.estimators.base import BoundarySpec, Factory
from dnifx.estimators.head import Head
from dnifx.estimators.labelled import ExampleLoss, LabelledGradient, label_loss, need_context, uncompiled
from dnifx.runtime.emitted.gradients import predicted_gradients

fx.wrap("predicted_gradients")


@dataclass(frozen=True)
class Critic:
    """Predicts the loss of each example and answers with the gradient of that prediction.

    m(h, y) = l(p(h), y), where p is a classifier; g = dm/dh. The parameters of p minimise (m(h, y) - L)^2, where L is the
    example's loss, known once the last partition has run. No target gradient is needed.

    The critic learns well from the loss of each example. The trainer has it if ``loss=`` returns one for each example
    (``reduction="none"``); of a reduced loss, the trainer has only the batch mean. A fused forward needs the target,
    ``net(x, context=y, target=y)``, and computes the module's ``loss=`` from it.

    Args:
        head: Builds p, as in ``LocalLoss``.
        loss: l, as in ``LocalLoss``.

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
    """Differentiates a predicted loss; ``sobolev`` weighs the fit of the gradients to the target, 0 fits the loss alone."""

    needs_loss = True
    fit = "absolute"

    def __init__(self, head: nn.Module, loss: ExampleLoss, sobolev: float = 0.0) -> None:
        super().__init__(head, loss)
        self.fit_weight = sobolev
        self.needs_target = sobolev > 0

    @uncompiled
    def forward(
        self, values: tuple[Tensor, ...], context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the predicted loss with respect to each value, then the predicted losses [batch]."""
        leaves, predicted = self.losses(values, context, mask)
        found = predicted_gradients(predicted, leaves, self.needs_target)
        gradients = tuple(found[index] for index in range(len(leaves)))
        return *gradients, predicted
