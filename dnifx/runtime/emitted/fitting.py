"""What estimators are fitted to: targets and losses of examples, the gradient of the fit, how estimate and target compare."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dnifx.runtime.emitted.loss_scale import Factor


def example_weight(examples: int, mean: bool = True) -> float:
    """Return the weight of one example in the loss: 1/n for a mean over n examples, 1 for a sum."""
    return 1.0 / max(examples, 1) if mean else 1.0


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision or better."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def per_example(gradient: Tensor, weight: Factor) -> Tensor:
    """Return the per-example target: the gradient that arrived, divided by the weight of an example in the loss."""
    return wide(gradient) / weight


def fit_gradient(
    estimate: Tensor,
    target: Tensor,
    examples: int,
    fit: str = "squared",
    fit_weight: float = 1.0,
    loss_scale: Factor = 1.0,
) -> Tensor:
    """Return the gradient of the fit loss, the mean over examples of ||estimate - target||^2, at the estimate.

    Args:
        estimate: Per-example synthetic gradient, [batch, ...].
        target: Per-example target gradient of the same shape, times the loss scale.
        examples: Number of examples that the mean runs over.
        fit: ``"absolute"`` takes the sum of absolute errors in place of squared ones.
        fit_weight: What an absolute error is multiplied by.
        loss_scale: What the loss was multiplied by; the fit loss is multiplied by its absolute value.
    """
    plain = isinstance(loss_scale, float) and loss_scale == 1
    error = estimate - target if plain else wide(estimate) * loss_scale - target
    if fit == "absolute":
        gradient = error.sign_().mul_(fit_weight / examples)
        return (gradient if plain else gradient * loss_scale).to(estimate.dtype)
    gradient = error.mul_(2.0 / examples)
    return (gradient if plain else gradient * sign_of(loss_scale)).to(estimate.dtype)


def sign_of(factor: Factor) -> Factor:
    """Return the sign of a number or a tensor."""
    return factor.sign() if isinstance(factor, Tensor) else math.copysign(1.0, factor)


def magnitude(factor: Factor) -> Factor:
    """Return the absolute value of a number or a tensor."""
    return factor.abs() if isinstance(factor, Tensor) else abs(factor)


def arriving_fit(
    estimate: Tensor,
    arriving: Tensor,
    examples: int,
    weight: float,
    loss_scale: Factor = 1.0,
    fit: str = "squared",
    fit_weight: float = 1.0,
) -> Tensor:
    """Return what an estimate receives in the backward pass; see ``GradientEstimator.fit``.

    Args:
        estimate: Per-example synthetic gradient, [batch, ...].
        arriving: The gradient that arrived at the value.
        examples: Number of examples.
        weight: Weight of an example in the loss.
        loss_scale: What the loss was multiplied by.
        fit: ``"squared"``, ``"absolute"``, ``"average"`` or ``"own"``.
        fit_weight: What an absolute error is multiplied by.
    """
    if fit == "own":
        return torch.ones_like(estimate, dtype=wide(estimate).dtype) * magnitude(loss_scale)
    found = fit_gradient(estimate, per_example(arriving, weight), examples, fit, fit_weight, loss_scale)
    return found / magnitude(loss_scale) if fit == "average" else found


def arrived(leaf: Tensor) -> Tensor:
    """Return the gradient that consumers sent to a value, zero where none of them used it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def count_only(estimate: Tensor, mask: Tensor) -> Tensor:
    """Return an estimate with zeros where the mask says that a token does not count; its fit there is zero too.

    Args:
        estimate: Per-token estimate or value [batch, length, ...]; any other shape is returned as it is.
        mask: [batch, length], non-zero for tokens that count.
    """
    if estimate.dim() <= mask.dim() or estimate.shape[: mask.dim()] != mask.shape:
        return estimate
    counts = (mask != 0).reshape(*mask.shape, *[1] * (estimate.dim() - mask.dim()))
    return torch.where(counts, estimate, torch.zeros_like(estimate))


def propagated(
    estimates: Sequence[Tensor], targets: Sequence[Tensor], seen: Sequence[Tensor], examples: int
) -> tuple[Tensor, ...]:
    """Return the gradient of each example's ||estimate - target||^2 with respect to the values that the estimator saw."""
    fits = [fit_gradient(one.detach(), target, examples) for one, target in zip(estimates, targets, strict=True)]
    found = torch.autograd.grad(tuple(estimates), tuple(seen), fits, retain_graph=True, materialize_grads=True)
    return tuple(gradient * examples for gradient in found)


def output_error(loss: Tensor, output: Tensor, weight: Factor, factor: Factor = 1.0) -> Tensor:
    """Return the gradient of each example's loss with respect to the model's output, [batch, ...].

    Args:
        loss: A scalar.
        output: The output.
        weight: The weight of an example in the loss, times the factor.
        factor: What the loss is multiplied by on the way, so that its gradient does not vanish in half precision.
    """
    (gradient,) = torch.autograd.grad(loss, (output,), torch.ones_like(loss) * factor, retain_graph=True)
    return per_example(gradient, weight)


def losses_of(loss: Tensor, examples: int, mean: bool = True) -> Tensor:
    """Return one loss for each example, [examples]; each gets the batch mean if the loss is reduced already."""
    wide = loss.detach()
    return wide if wide.dim() else (wide if mean else wide / examples).expand(examples)


def example_losses(loss: Tensor, mean: bool = True) -> Tensor:
    """Return the loss to differentiate: a scalar as it is, and losses of examples averaged, or summed if not ``mean``."""
    return loss if loss.dim() == 0 else loss.mean() if mean else loss.sum()


def compare(estimates: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """Compare synthetic with target gradients, all values of a boundary together.

    Values with the same leading size are taken together, row by row; values of other sizes have rows of their own.

    Returns:
        ``cosine``: mean over rows (examples) of the cosine between estimate and target; ``relative_error``: ||estimate - target||
        / ||target||; ``wrong_signs``: share of the target's non-zero entries whose sign the estimate does not have;
        ``estimate_norm`` and ``target_norm``: root mean square over rows of the norm; ``estimator_loss``: mean over rows of
        ||estimate - target||^2. Scalars, on the device.
    """
    groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for estimate, target in zip(estimates, targets, strict=True):
        rows = len(estimate) if estimate.dim() else 1
        groups.setdefault(rows, []).append((estimate.detach().reshape(rows, -1), target.detach().reshape(rows, -1)))
    pairs = [
        (torch.cat(made, 1), torch.cat(true, 1))
        for made, true in (zip(*group, strict=True) for group in groups.values())
    ]
    cosines = [torch.nn.functional.cosine_similarity(*pair, dim=1) for pair in pairs]
    made, true = (torch.cat([each.flatten() for each in side]) for side in zip(*pairs, strict=True))
    rows, known = sum(groups), true != 0
    wrong, error = (made.sign() != true.sign()) & known, (made - true).norm()
    return {
        "cosine": torch.cat(cosines).mean(),
        "relative_error": error / true.norm(),
        "wrong_signs": wrong.sum() / known.sum(),
        "estimate_norm": made.norm() / rows**0.5,
        "target_norm": true.norm() / rows**0.5,
        "estimator_loss": error.square() / rows,
    }
