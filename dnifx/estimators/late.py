"""The true gradient, some steps late: what a pipeline without waiting uses where it has no estimator."""

from dataclasses import dataclass

from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator


@dataclass(frozen=True)
class Late:
    """Gives the producer the true gradient of ``k`` steps ago, with the activations and weights of that step.

    A partition with d such boundaries between itself and the loss makes, in step t, the update

        theta <- theta - rate * gradient of the loss at the weights and the batch of step t - k * d.

    No partition waits for another, and no estimator learns. For each step under way, a partition keeps its activations and a
    copy of its weights. Steps between two updates share one: with ``net.trainer(..., accumulate=k)`` and one cut there are two.

    Args:
        k: Steps by which each boundary's gradient is late. Over ranks, at least the round trip divided by the time of a step.

    References:
        Narayanan et al. 2021 (arXiv 2006.09503), PipeDream-2BW: two weight versions, and weights that are one update behind.

    Differs from the paper in: the gradient of a step is used ``k`` steps later, whenever that was an update or not.
    """

    k: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise EstimatorError(
                f"Late(k={self.k!r}): give a number of steps, 1 or more; gradient='oracle' is the gradient that is not late"
            )

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        return LateGradient(self.k)


class LateGradient(GradientEstimator):
    """Keeps the backward lock, for a backward pass of an earlier step."""

    locked = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.late = k

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Raise EstimatorError: there is nothing to estimate."""
        raise EstimatorError(
            "Late brings the true gradient some steps later and makes no estimate; train with net.trainer"
        )
