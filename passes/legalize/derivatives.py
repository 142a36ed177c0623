"""Derivatives that the model takes in its forward: what ``torch.autograd.grad`` differentiates has to lie in one partition."""

from collections.abc import Iterable

import torch

from dnifx.errors import LegalizeError
from dnifx.ir import Boundary, Program
from dnifx.passes.cuts.places import differentiated
from dnifx.passes.graph import captured, described


def refuse_cut_derivatives(program: Program, boundaries: Iterable[Boundary]) -> None:
    """Raise LegalizeError where a boundary lies between what a derivative is of and what it is with respect to.

    Behind an interface the gradient is an estimate, and ends at the boundary: the derivative would be another one, or none.
    """
    for node in captured(program).nodes:
        if node.target is torch.autograd.grad:
            own, region = program.partition_of[node.name], differentiated(node)
            outside = {each.name for each in region if program.partition_of[each.name] != own}
            crossed = [each.name for each in boundaries if outside.intersection(each.values)] or [
                cut.name for cut in program.cuts
            ]
            if outside:
                first = next(each for each in region if each.name in outside)
                raise LegalizeError(
                    f"{described(node)} calls torch.autograd.grad, and the cut at {', '.join(map(repr, crossed))} lies inside what it "
                    f"differentiates: {described(first)} is in submod_{program.partition_of[first.name]}, the call in submod_{own}. An "
                    "interface passes no derivative: leave out the cuts between the two, or cut before the tensor that is "
                    "differentiated for, or after the call"
                )
