"""The interface nodes: what runs on a cut in the fused graph. Emitted packages carry a copy, and one of the errors."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import DerivativeError

Backward = Callable[..., tuple[Any, ...]]


class Once(torch.autograd.Function):
    """Passes gradients on. Whoever differentiates them once more gets an error that names the boundary."""

    @staticmethod
    def forward(ctx: Any, boundary: str, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients. The anchor only makes autograd come back here."""
        ctx.boundary = boundary
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Refuse.

        Raises:
            DerivativeError: Always.
        """
        raise DerivativeError(
            f"boundary {ctx.boundary!r}: an interface cannot be differentiated twice, since its synthetic gradient has no derivative, "
            "and a gradient with create_graph=True (a gradient penalty, forces, a PINN) was differentiated through it. Call the net "
            "under `with net.backprop():`, where gradients are those of the model, or give this boundary gradient='oracle'"
        )


def differentiable_once(backward: Backward) -> Backward:
    """As torch's ``once_differentiable``; the error of a second derivative names the boundary, which is ``ctx.boundary``."""

    @wraps(backward)
    def marked(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *arriving)
        if not torch.is_grad_enabled():
            return found
        places = [place for place, each in enumerate(found) if isinstance(each, Tensor)]
        anchor = torch.zeros((), requires_grad=True)
        passed = Once.apply(ctx.boundary, anchor, *(found[place] for place in places))  # type: ignore[no-untyped-call]
        by_place = dict(zip(places, passed, strict=True))
        return tuple(by_place.get(place) for place in range(len(found)))

    return marked


def loss_scale(examples: int, mean: bool = True) -> float:
    """Return the weight of one example in the loss: 1/n for a mean over n examples, 1 for a sum."""
    return 1.0 / examples if mean else 1.0


class GradientSwap(torch.autograd.Function):
    """Passes values forward; backward, gives them the synthetic gradient and gives the estimator its fit gradient.

    With per-example estimates g and arriving gradients t of n examples, where the loss sums (scale 1) or averages
    (scale 1/n) over examples: the values receive ``g * scale``, or ``(1 - mix) * g * scale + mix * t`` where some of the
    arriving gradient is mixed in; the estimates receive the gradient of the mean over examples of ||g - t / scale||^2
    (Jaderberg et al. 2017, Section 2.2).

    Synthetic inputs, where there are any, pass forward in place of the values and are fitted to them.
    """

    @staticmethod
    def forward(
        ctx: Any, boundary: str, examples: int, mean: bool, mix: float, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Take ``count`` values, as many estimates, and none or as many synthetic inputs; return what passes forward."""
        ctx.boundary, ctx.examples, ctx.mean, ctx.mix = boundary, examples, mean, mix
        values, imagined = tensors[:count], tensors[2 * count :]
        ctx.save_for_backward(*tensors[count:], *(values if imagined else ()))
        return tuple(each.view_as(each) for each in imagined or values)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Give the values the estimates; give estimates and synthetic inputs their fit gradients."""
        count, saved = len(arriving), ctx.saved_tensors
        estimates, imagined, values = saved[:count], saved[count : 2 * count], saved[2 * count :]
        scale = loss_scale(ctx.examples, ctx.mean)
        synthetic = [
            mixed(estimate.detach() * scale, gradient, ctx.mix)
            for estimate, gradient in zip(estimates, values or arriving, strict=True)
        ]
        fits = [
            fit_gradient(estimate, per_example(gradient, scale), ctx.examples) if want else None
            for estimate, gradient, want in zip(
                estimates, arriving, ctx.needs_input_grad[5 + count : 5 + 2 * count], strict=True
            )
        ]
        guesses = [fit_gradient(*pair, ctx.examples) for pair in zip(imagined, values, strict=True)]
        return None, None, None, None, None, *synthetic, *fits, *guesses


def swap_gradients(
    values: Sequence[Tensor],
    estimates: Sequence[Tensor],
    examples: int,
    mean: bool = True,
    mix: float = 0.0,
    imagined: Sequence[Tensor] = (),
    boundary: str = "",
) -> tuple[Tensor, ...]:
    """Return the values, or synthetic inputs; backward, swap the arriving gradients for the estimates and fit the models.

    Args:
        values: The values that cross a boundary.
        estimates: The estimator's answers, per example.
        examples: Number of examples.
        mean: Whether the loss averages over examples.
        mix: Share of the arriving gradient in what the values receive; 0 where there are synthetic inputs.
        imagined: Synthetic inputs, which pass forward in place of the values.
        boundary: The boundary's name, for the error of a second derivative.
    """
    given = boundary, examples, mean, mix, len(values)
    swapped: tuple[Tensor, ...] = GradientSwap.apply(*given, *values, *estimates, *imagined)  # type: ignore[no-untyped-call]
    return swapped


def mixed(estimate: Tensor, arriving: Tensor, mix: float) -> Tensor:
    """Return what a producer receives: the estimate, the arriving gradient (mix 1), or some of each, in the latter's dtype."""
    if mix == 0:
        return estimate.to(arriving.dtype)
    return arriving if mix == 1 else ((1 - mix) * estimate + mix * arriving).to(arriving.dtype)


class GradientLeak(torch.autograd.Function):
    """Passes a value forward, and back the gradient that flows into it, weighted."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        """Return the value."""
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Weight the gradient."""
        return gradient * ctx.weight, None


def leak_gradient(value: Tensor, weight: float, examples: int, mean: bool = True) -> Tensor:
    """Return a value for an estimator whose own loss flows back into it: ``weight`` times the gradient of each example."""
    leaked: Tensor = GradientLeak.apply(value, weight if mean else weight * examples)  # type: ignore[no-untyped-call]
    return leaked


def propagated(
    estimates: Sequence[Tensor], targets: Sequence[Tensor], seen: Sequence[Tensor], examples: int
) -> tuple[Tensor, ...]:
    """Return the gradient of each example's ||estimate - target||^2 with respect to the values that the estimator saw."""
    fits = [fit_gradient(one.detach(), target, examples) for one, target in zip(estimates, targets, strict=True)]
    found = torch.autograd.grad(tuple(estimates), tuple(seen), fits, retain_graph=True, materialize_grads=True)
    return tuple(gradient * examples for gradient in found)


def output_error(loss: Tensor, output: Tensor, scale: float) -> Tensor:
    """Return the gradient of each example's loss with respect to the model's output, [batch, ...]."""
    (gradient,) = torch.autograd.grad(loss, (output,), retain_graph=True)
    return per_example(gradient, scale)


class OutputError(torch.autograd.Function):
    """Passes the output forward; backward, asks the estimators that see its error, and gives values their answers."""

    @staticmethod
    def forward(
        ctx: Any,
        estimators: Sequence[tuple[Any, int]],
        boundary: str,
        examples: int,
        mean: bool,
        mask: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        """Take the output, then the values of each estimator's boundary; return the output."""
        ctx.boundary, ctx.estimators, ctx.scale, ctx.mask = boundary, estimators, loss_scale(examples, mean), mask
        ctx.save_for_backward(*tensors[1:])
        return tensors[0].view_as(tensors[0])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the error through, and give every value its synthetic gradient."""
        error, values = per_example(arriving[0], ctx.scale), list(ctx.saved_tensors)
        synthetic: list[Tensor] = []
        for estimator, count in ctx.estimators:
            given = values[len(synthetic) : len(synthetic) + count]
            seen = tuple(value if ctx.mask is None else count_only(value, ctx.mask) for value in given)
            for estimate, value in zip(estimator(seen, error), given, strict=True):
                counted = estimate if ctx.mask is None else count_only(estimate, ctx.mask)
                synthetic.append((counted * ctx.scale).to(value.dtype))
        return None, None, None, None, None, arriving[0], *synthetic


def feed_back(
    output: Tensor,
    boundaries: Sequence[Sequence[Tensor]],
    estimators: Sequence[Any],
    examples: int,
    mean: bool = True,
    mask: Tensor | None = None,
    boundary: str = "",
) -> Tensor:
    """Return the output; in the backward pass, estimators see its error and the values of boundaries receive their answers.

    Args:
        output: [batch, ...].
        boundaries: The values of each boundary; their consumers read them detached.
        estimators: One for each boundary. It takes the values and the error of each example, [batch, ...].
        examples: Number of examples.
        mean: Whether the loss averages over examples.
        mask: Which tokens count, [batch, length].
        boundary: The boundaries' names, for the error of a second derivative.
    """
    asked = [(estimator, len(values)) for estimator, values in zip(estimators, boundaries, strict=True)]
    tensors = [value for values in boundaries for value in values]
    passed: Tensor = OutputError.apply(asked, boundary, examples, mean, mask, output, *tensors)  # type: ignore[no-untyped-call]
    return passed


class LossLesson(torch.autograd.Function):
    """Passes outputs forward; backward, fits predictions of the loss to the loss of each example."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take so many outputs, then the predictions, [batch] each; return the outputs."""
        ctx.save_for_backward(losses, *tensors[count:])
        return tuple(output.view_as(output) for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the gradients through, and turn the losses into the predictions' fit gradients."""
        losses, *predictions = ctx.saved_tensors
        return None, None, *arriving, *(fit_gradient(each.detach(), losses, len(losses)) for each in predictions)


def tell_losses(outputs: Sequence[Any], predictions: Sequence[Tensor], losses: Tensor) -> tuple[Any, ...]:
    """Return the outputs; in the backward pass, predictions of the loss of each example, [batch], are fitted to it."""
    taught = [each for each in predictions if each.requires_grad]
    places = [place for place, each in enumerate(outputs) if isinstance(each, Tensor) and each.requires_grad]
    carried = [outputs[place] for place in places]
    passed = LossLesson.apply(losses, len(carried), *carried, *taught)  # type: ignore[no-untyped-call]
    found = dict(zip(places, passed, strict=True))
    return tuple(found.get(place, each) for place, each in enumerate(outputs))


def scheduled_alone(values: Sequence[Tensor], boundary: str) -> tuple[Tensor, ...]:
    """Return the values of a boundary whose estimator needs what only a training step sees.

    Raises:
        RuntimeError: Autograd records.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the estimator of boundary {boundary!r} needs the loss or the output's error, which this forward does not see; train "
            "with Trainer.step, and evaluate under torch.no_grad()"
        )
    return tuple(values)


def fit_gradient(estimate: Tensor, target: Tensor, examples: int) -> Tensor:
    """Return the gradient of the fit loss, the mean over examples of ||estimate - target||^2, at the estimate.

    Args:
        estimate: Per-example synthetic gradient, [batch, ...].
        target: Per-example target gradient of the same shape.
        examples: Number of examples that the mean runs over.
    """
    return (estimate - target).mul_(2.0 / examples).to(estimate.dtype)


def backpropagate(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], shared: Sequence[Tensor] = ()) -> None:
    """Backpropagate from the tensors that carry a graph. A detached value that was only passed on carries none.

    Several backward passes reach the tensors in ``shared``. Their gradients are added in new memory: autograd may keep the
    gradients of two leaves in the same memory (as for ``torch.stack([a, b]).sum(0)``), and adding to one in place would
    change the other.
    """
    pairs = [(tensor, gradient) for tensor, gradient in zip(tensors, gradients, strict=True) if tensor.requires_grad]
    if not pairs:
        return
    earlier = [(leaf, leaf.grad) for leaf in shared if leaf.grad is not None]
    for leaf, _ in earlier:
        leaf.grad = None
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
    for leaf, before in earlier:
        leaf.grad = before if leaf.grad is None else added(before, leaf.grad)


def added(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of two gradients; torch adds a sparse one to a dense one, not the other way round."""
    return second + first if first.is_sparse else first + second


def apply_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Step an optimizer and drop the gradients: ``zero_grad`` without its profiling."""
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def per_example(gradient: Tensor, scale: float) -> Tensor:
    """Return the per-example target: the gradient that arrived, divided by the scale, in single precision or better."""
    wide = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
    return wide / scale


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


def detached(value: Any) -> Any:
    """Detach every tensor in a value, as an operation inside ``torch.no_grad()`` does."""
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def differentiating(function: Any, *inputs: Any) -> Any:
    """Call a function that differentiates inside; under ``torch.no_grad()`` its result keeps no graph."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        values = function(*inputs)
    return values if wanted else detached(values)


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
        ``estimate_norm`` and ``target_norm``: root mean square over rows of the norm. Scalars, on the device.
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
    wrong = (made.sign() != true.sign()) & known
    return {
        "cosine": torch.cat(cosines).mean(),
        "relative_error": (made - true).norm() / true.norm(),
        "wrong_signs": wrong.sum() / known.sum(),
        "estimate_norm": made.norm() / rows**0.5,
        "target_norm": true.norm() / rows**0.5,
    }
