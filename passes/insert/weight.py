"""Weight: estimators chosen by name that outweigh the model, in weights or in FLOPs."""

import warnings
from collections.abc import Mapping, Sequence

from dnifx.errors import CostWarning
from dnifx.ir import Interface, Program, count_parameters

SMALL = {"weight": 1_000_000, "FLOP": 100_000_000}
"""So many weights and FLOPs of estimators are no matter, however small the model is."""

REMEDY = (
    "Give that boundary a smaller one, such as dnifx.estimators.Affine(), Synthetic(width=64, kernel=1) or Suffix(blocks=0, budget=0.25), "
    "or cut where the value has fewer features"
)


def warn_of_weight(program: Program, interfaces: Sequence[Interface]) -> None:
    """Warn once where the estimators have more weights than the model, or need more FLOPs."""
    weights = {each.boundary: count_parameters(each.estimator) for each in interfaces}
    flops = {each.boundary: each.flops or 0 for each in interfaces}
    model = sum(partition.flops for partition in program.partitions)
    if not outweighs(program, "weight", weights, count_parameters(program.model)):
        outweighs(program, "FLOP", flops, model)


def outweighs(program: Program, what: str, sizes: Mapping[int, int], own: int) -> bool:
    """Warn where estimators have more of something than the model, and return whether they have."""
    total = sum(sizes.values())
    if total <= max(own, SMALL[what]):
        return False
    largest = program.boundaries[max(sizes, key=sizes.__getitem__)]
    values = ", ".join(map(str, largest.specs))
    warnings.warn(
        f"the estimators have {total:,} {what}s, {total / max(own, 1):.1f} times the {own:,} of {type(program.model).__name__}; the "
        f"largest is that of boundary {largest.name!r}, {sizes[largest.index]:,} {what}s for {values}. {REMEDY}",
        CostWarning,
        stacklevel=3,
    )
    return True
