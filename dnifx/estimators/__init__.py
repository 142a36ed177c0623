"""Gradient estimators: what answers, at once, with the gradient that the loss will have at a boundary."""

from dnifx.estimators.base import BoundarySpec, Factory, GradientEstimator
from dnifx.estimators.inputs import InputSpec, SyntheticInput
from dnifx.estimators.oracle import Oracle
from dnifx.estimators.stale import Stale
from dnifx.estimators.synthetic import Synthetic
from dnifx.estimators.zero import Zero

BY_NAME: dict[str, Factory] = {
    "synthetic": Synthetic(),
    "zero": Zero(),
    "stale": Stale(),
    "oracle": Oracle(),
}
"""The estimators that ``gradient=`` takes by name."""

__all__ = [
    "BY_NAME",
    "BoundarySpec",
    "Factory",
    "GradientEstimator",
    "InputSpec",
    "Oracle",
    "Stale",
    "Synthetic",
    "SyntheticInput",
    "Zero",
]
