"""Eligibility traces: an estimator on a cut in time learns from all windows so far, and none of them is kept.

With g = g(h) the estimate at a state h, phi the estimator's parameters, J = dh_w/dh_{w-1} a window's Jacobian, t the target that
arrives from one window and gamma the cut's scale, all per example:

    e <- gamma * lambda * J e + dg(h)/dphi,    dphi ~ (t - g(h)) e,

which in sum, weights fixed, is the fit of every g(h) to its lambda-return. J is computed row by row, one backward pass through the
window each; e takes batch x state x parameters numbers. Nothing is sampled or projected, so it is for small states: a step of a
vanilla cell with 16, 32 or 64 units and 32 examples, a linear estimator, took 4.6, 11 and 80 ms on one core, about 1 ms without.

References:
    Pemberton & Costa 2024, "BP(lambda): Online Learning via Synthetic Gradients", TMLR (arXiv 2401.07044).

Differs from the paper in: a window may have several steps; gamma is the scale that the core uses too; the estimator is any that
answers for each example by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from dnifx.errors import InputError
from dnifx.runtime.emitted.fitting import fit_gradient
from dnifx.runtime.emitted.loss_scale import Factor
from dnifx.runtime.emitted.windows import by_example, without_rows


def window_jacobian(values: Sequence[Tensor], leaves: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Return the Jacobian of a window's last state with respect to its first, [batch, state, state], one row at a time.

    Args:
        values: The state that the window leaves; its graph is kept.
        leaves: The state that the window started from.
        dims: The dimension of each tensor that counts examples, none of which may depend on another example.
    """
    rows = []
    for value, dim in zip(values, dims, strict=True):
        for column in by_example(value, dim).flatten(1).sum(0):
            found = torch.autograd.grad(column, tuple(leaves), retain_graph=True, materialize_grads=True)
            rows.append(in_a_row(found, dims))
    return torch.stack(rows, 1)


def in_a_row(tensors: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Return tensors of a state beside each other, [batch, state]."""
    return torch.cat([by_example(each, dim).flatten(1) for each, dim in zip(tensors, dims, strict=True)], 1)


def parameter_jacobian(estimator: nn.Module, seen: Sequence[Tensor]) -> Tensor:
    """Return each example's derivative of the estimate with respect to the estimator's parameters, [batch, state, parameters]."""
    weights = {name: each.detach() for name, each in estimator.named_parameters() if each.requires_grad}

    def estimate(weights: dict[str, Tensor], *values: Tensor) -> Tensor:
        made = functional_call(estimator, weights, (tuple(value[None] for value in values),))
        return torch.cat([each.flatten() for each in made])

    each = vmap(jacrev(estimate), in_dims=(None, *(0 for _ in seen)))(weights, *seen)
    return torch.cat([derivative.flatten(2) for derivative in each.values()], 2)


def extend_trace(passed: Tensor | None, estimator: nn.Module, seen: Sequence[Tensor], weight: float) -> Tensor:
    """Return the trace at the state that a window starts from, [batch, state, parameters].

    Args:
        passed: The trace of the states before it, passed on to this one; None at the first window.
        estimator: The estimator.
        seen: The state as the estimator sees it, detached.
        weight: What the trace before it counts: gamma * lambda.

    Raises:
        InputError: The trace is that of another number of examples.
    """
    own = parameter_jacobian(estimator, seen)
    if passed is None:
        return own
    if passed.shape != own.shape:
        raise InputError(
            f"the trace of a cut in time is of {len(passed)} examples, the batch has {len(own)}; keep to one batch size, or make a new "
            "trainer"
        )
    return own.add_(passed, alpha=weight)


def fit_by_trace(
    estimator: nn.Module,
    trace: Tensor,
    estimates: Sequence[Tensor],
    targets: Sequence[Tensor],
    examples: int,
    factor: Factor = 1.0,
) -> None:
    """Add to the parameters' gradients that of the mean over examples of ||estimate - target||^2, times a factor, by the trace."""
    errors = [
        fit_gradient(one.detach(), target * factor, examples, loss_scale=factor)
        for one, target in zip(estimates, targets, strict=True)
    ]
    gradient = torch.einsum("bs,bsp->p", torch.cat([each.flatten(1) for each in errors], 1), trace)
    learners = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
    for parameter, part in zip(learners, torch.split(gradient, [each.numel() for each in learners]), strict=True):
        shaped = part.view_as(parameter)
        parameter.grad = shaped if parameter.grad is None else parameter.grad + shaped


def pass_on(trace: Tensor, jacobian: Tensor, reset: Tensor | None) -> Tensor:
    """Return the trace through a window, J e, and none for the examples that began an episode in it."""
    return jacobian @ without_rows(trace, reset, 0)
