"""Gradient estimators: they answer, at once, with the gradient that the loss will have at a boundary."""

from dnifx.estimators.affine import Affine
from dnifx.estimators.auto import Auto
from dnifx.estimators.base import BoundarySpec, Factory, GradientEstimator
from dnifx.estimators.bplambda import BPLambda
from dnifx.estimators.critic import Critic
from dnifx.estimators.direct_feedback import DirectFeedback
from dnifx.estimators.exact import Exact
from dnifx.estimators.head import Head
from dnifx.estimators.inputs import InputSpec, SyntheticInput
from dnifx.estimators.late import Late
from dnifx.estimators.local_loss import LocalLoss
from dnifx.estimators.oracle import Oracle
from dnifx.estimators.prop import Prop
from dnifx.estimators.sigmoid_linear import SigmoidLinear
from dnifx.estimators.sobolev import Sobolev
from dnifx.estimators.stale import Stale
from dnifx.estimators.state import SyntheticState
from dnifx.estimators.suffix import Suffix
from dnifx.estimators.synthetic import Synthetic
from dnifx.estimators.zero import Zero

BY_NAME: dict[str, Factory] = {
    "synthetic": Affine(),
    "auto": Auto(),
    "paper": Synthetic(),
    "sigmoid_linear": SigmoidLinear(),
    "critic": Critic(),
    "sobolev": Sobolev(),
    "local_loss": LocalLoss(),
    "suffix": Suffix(),
    "direct_feedback": DirectFeedback(),
    "bplambda": BPLambda(),
    "prop": Prop(),
    "stale": Stale(),
    "zero": Zero(),
    "oracle": Oracle(),
}
"""The estimators that ``gradient=`` takes by name."""

IN_TIME: dict[str, Factory] = {"exact": Exact()}
"""Those that stand on cuts in time alone."""

__all__ = [
    "BY_NAME",
    "IN_TIME",
    "Affine",
    "Auto",
    "BPLambda",
    "BoundarySpec",
    "Critic",
    "DirectFeedback",
    "Exact",
    "Factory",
    "GradientEstimator",
    "Head",
    "InputSpec",
    "Late",
    "LocalLoss",
    "Oracle",
    "Prop",
    "SigmoidLinear",
    "Sobolev",
    "Stale",
    "Suffix",
    "Synthetic",
    "SyntheticInput",
    "SyntheticState",
    "Zero",
]
