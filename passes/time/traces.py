"""Eligibility traces of cuts in time: how much memory one takes, and which estimators can have one."""

import torch

from dnifx.errors import EstimatorError
from dnifx.ir import Interface, Recurrence
from dnifx.runtime.training.traces import parameter_jacobian

MOST_TRACE_BYTES = 2**30
"""The largest eligibility trace that is allowed."""


def check_traced(each: Recurrence, interface: Interface) -> None:
    """Raise EstimatorError where an estimator cannot have a trace.

    It has none if it waits for later windows, if the trace is too large, or if its answers to examples depend on each other.
    """
    if interface.locked:
        raise EstimatorError(
            f"boundary {each.name!r}: {interface.description} waits for later windows, and a trace is fitted in each window; give "
            "an estimator that does not wait, such as SyntheticState(hidden=0), or leave trace out"
        )
    (batch, *_), itemsize = each.specs[0].shape, each.specs[0].dtype.itemsize
    state = sum(spec.elements // batch for spec in each.specs)
    parameters = sum(each.numel() for each in interface.estimator.parameters() if each.requires_grad)
    size = batch * state * parameters * itemsize
    if size > MOST_TRACE_BYTES:
        raise EstimatorError(
            f"boundary {each.name!r}: the trace of {interface.description} has {batch} examples x {state} state values x "
            f"{parameters:,} parameters, which is {size / 2**30:.1f} GiB, more than {MOST_TRACE_BYTES / 2**30:.0f}; give a smaller "
            "estimator, such as SyntheticState(hidden=0), a smaller state or batch, or leave trace out"
        )
    values = tuple(torch.zeros(2, *spec.shape[1:], dtype=spec.dtype, device=spec.device) for spec in each.specs)
    try:
        parameter_jacobian(interface.estimator, values)
    except (RuntimeError, ValueError) as error:
        raise EstimatorError(
            f"boundary {each.name!r}: {interface.description} cannot have a trace, since its estimates of two examples cannot be "
            f"differentiated separately: {error}\ngive an estimator without batch norm, such as SyntheticState(hidden=0)"
        ) from error
