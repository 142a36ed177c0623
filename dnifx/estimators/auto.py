"""Auto: for each boundary, the estimator that makes most of what is known there."""

from dataclasses import dataclass, field

from torch import nn

from dnifx.estimators.affine import Affine
from dnifx.estimators.base import BoundarySpec, Factory
from dnifx.estimators.suffix import Suffix


@dataclass(frozen=True)
class Auto:
    """Chooses an estimator for each boundary by what is known there; the report says which, and why.

    Where the loss is known (``dnifx.decouple(..., loss=...)``, or a model that returns its loss first), it is ``suffix``, which
    learns from that loss. It is ``otherwise`` where no loss is known and where no suffix can be made. A state in time has the
    synthetic gradient of states, ``SyntheticState()``, and messages between parts have ``otherwise``.

    With a suffix, a call of the net takes the target: ``net(x, target=y)``.

    Args:
        suffix: How thin a suffix is.
        otherwise: Builds the estimator of the other boundaries.
    """

    suffix: Suffix = field(default=Suffix())
    otherwise: Factory = field(default=Affine())

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of a boundary of which no more is known than its spec."""
        return self.otherwise(spec)
