"""Weight: default estimators that outweigh the model."""

import warnings
from collections.abc import Sequence

from dnifx.errors import CostWarning
from dnifx.ir import Interface, Program, count_parameters

SMALL = 1_000_000
"""So many weights of estimators are no matter, however small the model is."""


def warn_of_weight(program: Program, interfaces: Sequence[Interface]) -> None:
    """Warn where the estimators have more weights than the model."""
    sizes = {each.boundary: count_parameters(each.estimator) for each in interfaces}
    total, own = sum(sizes.values()), count_parameters(program.model)
    if total <= max(own, SMALL):
        return
    largest = program.boundaries[max(sizes, key=sizes.__getitem__)]
    values = ", ".join(map(str, largest.specs))
    warnings.warn(
        f"the estimators have {total:,} weights, {total / max(own, 1):.1f} times the {own:,} of {type(program.model).__name__}; the "
        f"largest is that of boundary {largest.name!r}, {sizes[largest.index]:,} weights for {values}. Give that boundary a smaller one, "
        "such as dnifx.estimators.Synthetic(width=64, kernel=1) or Synthetic(hidden=0), or cut where the value has fewer features",
        CostWarning,
        stacklevel=2,
    )
