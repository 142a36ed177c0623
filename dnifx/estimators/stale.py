"""The stale-gradient baseline: an exponential average of past gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator
from dnifx.runtime.emitted.gradients import average_gradient

fx.wrap("average_gradient")


@dataclass(frozen=True)
class Stale:
    """Answers with the exponential average, over past mini-batches, of the batch mean of the target gradient.

    average <- decay * average + (1 - decay) * mean over examples of the target.

    Args:
        decay: Share of the old average that is kept, in [0, 1).

    References:
        Jaderberg et al. 2017 (arXiv 1608.05343v1), Section 3.1 and appendix: the baseline "only slightly better than zero".
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise EstimatorError(f"Stale(decay={self.decay}): the decay must be in [0, 1)")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        return StaleGradient(spec, self.decay)


class StaleGradient(GradientEstimator):
    """One average for each value. The anchor parameter only makes autograd call the average's backward."""

    fit = "average"

    def __init__(self, spec: BoundarySpec, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.anchor = nn.Parameter(torch.zeros(()))
        for index, value in enumerate(spec.values):
            self.register_buffer(f"average_{index}", torch.zeros(1, *value.shape[1:]))

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the running average for each example."""
        return tuple(
            average_gradient(self.anchor, self.get_buffer(f"average_{index}"), value, self.decay)
            for index, value in enumerate(values)
        )
