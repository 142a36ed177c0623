"""The true gradient: what every other estimator is measured against."""

from dataclasses import dataclass

from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator


@dataclass(frozen=True)
class Oracle:
    """Waits for the gradient that backpropagation gives; with oracles on all boundaries, a net runs backpropagation."""

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        return OracleGradient()


class OracleGradient(GradientEstimator):
    """Keeps the backward lock: the producer takes the target itself."""

    locked = True

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Raise EstimatorError: the true gradient is not known before the backward pass."""
        raise EstimatorError(
            "an oracle knows the gradient only after the backward pass; use another estimator to have one before"
        )
