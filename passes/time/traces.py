"""What an eligibility trace of a cut in time takes, and which estimators have one."""

import torch

from dnifx.errors import EstimatorError
from dnifx.ir import Interface, Recurrence
from dnifx.runtime.training.traces import parameter_jacobian

MOST_TRACE_BYTES = 2**30
"""Largest eligibility trace that is made."""


def check_traced(each: Recurrence, interface: Interface) -> None:
    """Raise EstimatorError where an estimator has no trace: too much to hold, or not one estimate an example."""
    (batch, *_), itemsize = each.specs[0].shape, each.specs[0].dtype.itemsize
    state = sum(spec.elements // batch for spec in each.specs)
    parameters = sum(each.numel() for each in interface.estimator.parameters() if each.requires_grad)
    size = batch * state * parameters * itemsize
    if interface.locked or size > MOST_TRACE_BYTES:
        why = (
            "waits for later windows"
            if interface.locked
            else f"takes {size / 2**30:.1f} GiB, more than {MOST_TRACE_BYTES / 2**30:.0f}"
        )
        raise EstimatorError(
            f"boundary {each.name!r} has a trace of {batch} examples x {state} state values x {parameters:,} parameters, and "
            f"{interface.description} {why}: give a smaller one, as SyntheticState(hidden=0), a smaller state or batch, or leave trace out"
        )
    values = tuple(torch.zeros(2, *spec.shape[1:], dtype=spec.dtype, device=spec.device) for spec in each.specs)
    try:
        parameter_jacobian(interface.estimator, values)
    except (RuntimeError, ValueError) as error:
        raise EstimatorError(
            f"boundary {each.name!r}: {interface.description} has no trace, since its estimate of one example cannot be "
            f"differentiated apart from the others': {error}\ngive one without batch norm, as SyntheticState(hidden=0)"
        ) from error
