"""No gradient at all: the baseline without an interface."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnifx.estimators.base import BoundarySpec, GradientEstimator


@dataclass(frozen=True)
class Zero:
    """Answers 0 for every value. This is the same as detaching at the cut: the paper's "no bprop" baseline."""

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        return ZeroGradient()


class ZeroGradient(GradientEstimator):
    """Zeros of the values' shapes."""

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return a zero for each value."""
        return tuple(torch.zeros_like(value) for value in values)
