"""SG + prop: the producer also makes its values better to estimate gradients from."""

from dataclasses import dataclass, field

from torch import nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, Factory, GradientEstimator
from dnifx.estimators.blended import BlendedGradient
from dnifx.estimators.synthetic import Synthetic


@dataclass(frozen=True)
class Prop:
    """Adds to an estimate the gradient of the estimator's own loss with respect to the values.

    dL/dh := g(h) + alpha * dL_SG/dh with L_SG = ||g(h) - t||^2 for each example, where t is the target. L_SG needs t
    before the producer's backward pass, so the backward lock to the next partition stays.

    Args:
        alpha: Weight of that gradient, above 0.
        estimator: Builds the estimator, which has to learn from the target.

    Raises:
        EstimatorError: ``alpha`` is not positive, or the estimator does not learn from the target.

    Example:
        >>> import torch, dnifx
        >>> from torch.nn.functional import mse_loss
        >>> def first_gradient(gradient):
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        ...     x = torch.randn(8, 4)
        ...     net = dnifx.decouple(model, ["0"], args=(x,), gradient=gradient)
        ...     torch.nn.init.ones_(net.interfaces["cut_0"].inner.networks[0].layers[0].weight)
        ...     mse_loss(net(x), torch.ones(8, 1)).backward()
        ...     return model[0].weight.grad.norm().item()
        >>> linear = dnifx.estimators.Synthetic(hidden=0)
        >>> [round(first_gradient(Prop(alpha, linear)), 2) for alpha in (0.1, 0.2)]
        [2.89, 3.7]

    References:
        Czarnecki et al. 2017, "Understanding Synthetic Gradients and Decoupled Neural Interfaces", ICML, Section 6.

    Differs from the paper in: alpha weighs the squared error summed over units; the paper does not give its scale.
    """

    alpha: float = 0.1
    estimator: Factory = field(default=Synthetic())

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise EstimatorError(
                f"Prop(alpha={self.alpha}): alpha must be above 0; to do without it, give the estimator itself"
            )

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        inner = self.estimator(spec)
        learns = any(parameter.requires_grad for parameter in inner.parameters())
        from_target = not isinstance(inner, GradientEstimator) or (inner.needs_target and not inner.needs_loss)
        if not (learns and from_target):
            raise EstimatorError(
                f"boundary {spec.name!r}: Prop needs an estimator that is fitted to the target gradient alone, got "
                f"{type(inner).__name__}; give Synthetic() or SigmoidLinear(), for example"
            )
        return BlendedGradient(inner, spec, prop=self.alpha)
