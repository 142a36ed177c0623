"""The true gradient, some steps late: what a pipeline without waiting uses where it has no estimator."""

import math
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
        correction: Corrects a late gradient g for what the weights have moved since: it becomes
            g + correction * g * g * (weights now - weights then), in which g * g stands for the curvature. 0 changes nothing; the
            paper takes 0.04. The gradients that go on to earlier partitions are as they were.

    References:
        Narayanan et al. 2021 (arXiv 2006.09503), PipeDream-2BW: two weight versions, and weights that are one update behind.
        Zheng et al. 2017 (arXiv 1609.08326), DC-ASGD: the correction, there for the gradients of workers that are late.

    Differs from the papers in: the gradient of a step is used ``k`` steps later, whenever that was an update or not, and the
    correction is made with one number, which does not adapt.
    """

    k: int = 1
    correction: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise EstimatorError(
                f"Late(k={self.k!r}): give a number of steps, 1 or more; gradient='oracle' is the gradient that is not late"
            )
        number = isinstance(self.correction, int | float) and not isinstance(self.correction, bool)
        if not number or not 0 <= self.correction < math.inf:
            raise EstimatorError(f"Late(correction={self.correction!r}): give a number, 0 or more, such as 0.04")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        return LateGradient(self.k, float(self.correction))


class LateGradient(GradientEstimator):
    """Keeps the backward lock, for a backward pass of an earlier step."""

    locked = True

    def __init__(self, k: int, correction: float = 0.0) -> None:
        super().__init__()
        self.late, self.correction = k, correction

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Raise EstimatorError: there is nothing to estimate."""
        raise EstimatorError(
            "Late brings the true gradient some steps later and makes no estimate; train with net.trainer"
        )
