"""The Sobolev critic: predicts the loss and its gradient."""

from dataclasses import dataclass, field

from torch import nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, Factory
from dnifx.estimators.critic import CriticGradient
from dnifx.estimators.head import Head
from dnifx.estimators.labelled import ExampleLoss, label_loss, need_context


@dataclass(frozen=True)
class Sobolev:
    """A critic whose gradient is fitted to the target as well.

    m(h, y) = l(p(h), y); g = dm/dh. The parameters of p minimise (m(h, y) - L)^2 + weight * ||dm/dh - t||_1, where L is
    the example's loss and t the target gradient. Like ``Critic``, it learns best from a loss for each example, and a
    fused forward needs the target.

    Args:
        weight: Weight of the fit of the gradients, above 0.
        head: Builds p, as in ``LocalLoss``; it is differentiated twice.
        loss: l, as in ``LocalLoss``.

    Raises:
        EstimatorError: The weight is not positive, or there is no context to predict from.

    Example:
        >>> import torch, dnifx
        >>> from torch.nn.functional import cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> y = (x[:, 0] > 0).long()
        >>> net = dnifx.decouple(model, ["1"], args=(x,), gradient=Sobolev(), context="label", num_classes=2,
        ...                      loss=lambda output, target: cross_entropy(output, target, reduction="none"))
        >>> trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
        >>> results = [trainer.step(x, target=y, diagnose=True) for _ in range(200)]
        >>> bool(results[-1].loss < 0.1), bool(results[-1].diagnostics["1"]["cosine"] > 0.5)
        (True, True)

    References:
        Czarnecki et al. 2017, "Sobolev Training for Neural Networks", NIPS, Section 4.3.

    Differs from the paper in: the loss is fitted by squared error; the default p is linear over 2 x 2 averages.
    """

    weight: float = 1.0
    head: Factory = field(default=Head())
    loss: ExampleLoss = label_loss

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise EstimatorError(
                f"Sobolev(weight={self.weight}): the weight must be above 0; to do without it, give Critic()"
            )

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        need_context("Sobolev", spec)
        return CriticGradient(self.head(spec), self.loss, self.weight)
