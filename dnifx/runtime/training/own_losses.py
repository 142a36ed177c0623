"""Terms of the loss that partitions leave on the model and train themselves: checked before the first step."""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from dnifx.errors import LossError, nearest
from dnifx.ir import Program, Term, terms

OwnLosses = Mapping[str, float | None]
"""By attribute or glob, the weight of what a partition leaves there; None for what no loss reads."""


def with_own_losses(program: Program, own: OwnLosses) -> Program:
    """Return a program whose steps train the terms that have a weight.

    Raises:
        LossError: A partition before the last leaves something with a gradient that nobody named, or a named term is no scalar
            or has two names.
    """
    named = replace(program, own_losses=tuple(own))
    for term in terms(named):
        if len(term.names) > 1:
            raise LossError(f"own_losses= names {term.path} by {nearest('', term.names)}; give it one weight")
        if not term.names and not term.is_state and term.partition < len(program.partitions) - 1:
            raise LossError(
                f"forward leaves {term.path} with a gradient in submod_{term.partition}, which has made its backward pass before the "
                f"loss is known: a loss that reads it would not train it. Give net.trainer(..., own_losses={{{term.attribute!r}: "
                "weight}), and leave it out of the loss: the partition trains it. Give None for the weight if no loss reads it"
            )
        if any(own[name] is not None for name in term.names):
            check_scalar(program, term)
    return replace(program, own_losses=tuple(name for name, weight in own.items() if weight is not None))


def check_scalar(program: Program, term: Term) -> None:
    """Raise LossError where a term of the loss is not a scalar."""
    (spec,) = program.measures[term.value].tensors
    if spec.shape:
        raise LossError(
            f"own_losses= names {term.path}, which is {spec} in submod_{term.partition}; leave a scalar there, such as its mean, or give "
            "None for the weight if no loss reads it"
        )


def check_own_losses(program: Program, own: OwnLosses) -> None:
    """Raise LossError where own losses name nothing, have no proper weight, or cannot go with the net."""
    if not own:
        return
    if program.parts:
        raise LossError(
            "own_losses= goes with a net of one rate; with every=, return the term and add it to the loss of the part"
        )
    found = terms(replace(program, own_losses=tuple(own)))
    for name, weight in own.items():
        if not any(name in term.names for term in found):
            known = nearest(name, [term.attribute for term in found])
            raise LossError(
                f"own_losses= names {name!r}, but forward leaves nothing with a gradient there; it leaves some in {known}"
            )
        if weight is not None and (not isinstance(weight, int | float) or not isfinite(weight)):
            raise LossError(
                f"own_losses={{{name!r}: {weight!r}}}: give a number as the weight, or None if no loss reads it"
            )
    foresees = next((each for each in program.interfaces if each.needs_loss), None)
    if foresees is not None and any(weight is not None for weight in own.values()):
        raise LossError(
            f"own_losses= does not go with {foresees.description} on boundary {program.boundaries[foresees.boundary].name!r}, which "
            "predicts the loss and knows nothing of terms beside it; give an estimator that learns from the target"
        )
