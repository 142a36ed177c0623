"""The interface nodes: what stands on a cut in the fused graph. Imports torch alone, so that emitted packages can carry it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree


class GradientSwap(torch.autograd.Function):
    """Passes values forward; backward, gives them the synthetic gradient and gives the estimator its fit gradient.

    With per-example estimates g and arriving gradients t of n examples, where the loss sums (scale 1) or averages
    (scale 1/n) over examples: the values receive ``g * scale``, or ``(1 - mix) * g * scale + mix * t`` where some of the
    arriving gradient is mixed in; the estimates receive the gradient of the mean over examples of ||g - t / scale||^2
    (Jaderberg et al. 2017, Section 2.2).
    """

    @staticmethod
    def forward(ctx: Any, examples: int, mean: bool, mix: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take the values, then as many estimates; return the values."""
        count = len(tensors) // 2
        ctx.examples = examples
        ctx.mean = mean
        ctx.mix = mix
        ctx.save_for_backward(*tensors[count:])
        return tuple(value.view_as(value) for value in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Swap the arriving gradients for the estimates, and turn them into the estimates' fit gradients."""
        estimates = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3 + len(estimates) :]
        scale = 1.0 / ctx.examples if ctx.mean else 1.0
        synthetic = [
            mixed(estimate.detach() * scale, gradient, ctx.mix)
            for estimate, gradient in zip(estimates, arriving, strict=True)
        ]
        fits = [
            fit_gradient(estimate, per_example(gradient, scale), ctx.examples) if want else None
            for estimate, gradient, want in zip(estimates, arriving, wanted, strict=True)
        ]
        return None, None, None, *synthetic, *fits


class InputSwap(torch.autograd.Function):
    """As GradientSwap, but passes synthetic inputs forward in place of the values, and fits them to the values."""

    @staticmethod
    def forward(ctx: Any, examples: int, mean: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take the values, as many estimates and as many synthetic inputs; return the synthetic inputs."""
        count = len(tensors) // 3
        ctx.examples = examples
        ctx.mean = mean
        ctx.save_for_backward(*tensors)
        return tuple(imagined.view_as(imagined) for imagined in tensors[2 * count :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Give values the estimates, estimates and synthetic inputs their fit gradients."""
        count = len(arriving)
        values, estimates = ctx.saved_tensors[:count], ctx.saved_tensors[count : 2 * count]
        scale = 1.0 / ctx.examples if ctx.mean else 1.0
        synthetic = [(g * scale).to(value.dtype) for g, value in zip(estimates, values, strict=True)]
        fits = [
            fit_gradient(g, per_example(t, scale), ctx.examples) if want else None
            for g, t, want in zip(estimates, arriving, ctx.needs_input_grad[2 + count :], strict=False)
        ]
        imagined = [
            fit_gradient(a, value, ctx.examples)
            for a, value in zip(ctx.saved_tensors[2 * count :], values, strict=True)
        ]
        return None, None, *synthetic, *fits, *imagined


def swap_gradients(
    values: Sequence[Tensor], estimates: Sequence[Tensor], examples: int, mean: bool = True, mix: float = 0.0
) -> tuple[Tensor, ...]:
    """Return the values; in the backward pass their gradient is the synthetic one, and the arriving one fits the estimator."""
    swapped: tuple[Tensor, ...] = GradientSwap.apply(examples, mean, mix, *values, *estimates)  # type: ignore[no-untyped-call]
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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Weight the gradient."""
        return gradient * ctx.weight, None


def leak_gradient(value: Tensor, weight: float, examples: int, mean: bool = True) -> Tensor:
    """Return what an estimator sees of a value where the gradient of its own loss flows back: ``weight`` of each example's."""
    leaked: Tensor = GradientLeak.apply(value, weight if mean else weight * examples)  # type: ignore[no-untyped-call]
    return leaked


def propagated(
    estimates: Sequence[Tensor], targets: Sequence[Tensor], seen: Sequence[Tensor], examples: int
) -> tuple[Tensor, ...]:
    """Return the gradient of each example's ||estimate - target||^2 with respect to the values that an estimator saw."""
    fits = [fit_gradient(one.detach(), target, examples) for one, target in zip(estimates, targets, strict=True)]
    found = torch.autograd.grad(tuple(estimates), tuple(seen), fits, retain_graph=True, materialize_grads=True)
    return tuple(gradient * examples for gradient in found)


def output_error(loss: Tensor, output: Tensor, scale: float) -> Tensor:
    """Return the gradient of each example's loss with respect to the model's output, [batch, ...]."""
    (gradient,) = torch.autograd.grad(loss, (output,), retain_graph=True)
    return per_example(gradient, scale)


class OutputError(torch.autograd.Function):
    """Passes the output forward; backward, asks estimators that answer from its error, and gives values their answers."""

    @staticmethod
    def forward(
        ctx: Any,
        estimators: Sequence[tuple[Any, int]],
        examples: int,
        mean: bool,
        mask: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        """Take the output, then the values of each estimator's boundary; return the output."""
        ctx.estimators, ctx.scale, ctx.mask = estimators, 1.0 / examples if mean else 1.0, mask
        ctx.save_for_backward(*tensors[1:])
        return tensors[0].view_as(tensors[0])

    @staticmethod
    @once_differentiable
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
        return None, None, None, None, arriving[0], *synthetic


def feed_back(
    output: Tensor,
    boundaries: Sequence[Sequence[Tensor]],
    estimators: Sequence[Any],
    examples: int,
    mean: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the output; in the backward pass the values of boundaries receive what estimators make of its error.

    Args:
        output: [batch, ...].
        boundaries: The values of each boundary; their consumers read them detached.
        estimators: One for each boundary, from (values, error of each example [batch, ...]) to synthetic gradients.
        examples: Number of examples.
        mean: Whether the loss averages over examples.
        mask: Which tokens count, [batch, length].
    """
    asked = [(estimator, len(values)) for estimator, values in zip(estimators, boundaries, strict=True)]
    tensors = [value for values in boundaries for value in values]
    passed: Tensor = OutputError.apply(asked, examples, mean, mask, output, *tensors)  # type: ignore[no-untyped-call]
    return passed


class LossLesson(torch.autograd.Function):
    """Passes outputs forward; backward, fits predictions of the loss to the loss of each example."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take so many outputs, then the predictions, [batch] each; return the outputs."""
        ctx.save_for_backward(losses, *tensors[count:])
        return tuple(output.view_as(output) for output in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Let the gradients through, and turn the losses into the predictions' fit gradients."""
        losses, *predictions = ctx.saved_tensors
        return None, None, *arriving, *(fit_gradient(each, losses, len(losses)) for each in predictions)


def tell_losses(outputs: Sequence[Any], predictions: Sequence[Tensor], losses: Tensor) -> tuple[Any, ...]:
    """Return the outputs; in the backward pass, what predicts the loss of each example, [batch], is fitted to the losses."""
    taught = [each for each in predictions if each.requires_grad]
    places = [place for place, each in enumerate(outputs) if isinstance(each, Tensor) and each.requires_grad]
    carried = [outputs[place] for place in places]
    passed = LossLesson.apply(losses, len(carried), *carried, *taught)  # type: ignore[no-untyped-call]
    found = dict(zip(places, passed, strict=True))
    return tuple(found.get(place, each) for place, each in enumerate(outputs))


def scheduled_alone(values: Sequence[Tensor], boundary: str) -> tuple[Tensor, ...]:
    """Return the values of a boundary whose estimator needs what a training step alone sees.

    Raises:
        RuntimeError: Gradients are recorded.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the estimator of boundary {boundary!r} needs what this forward does not see: train with Trainer.step, and evaluate "
            "under torch.no_grad()"
        )
    return tuple(values)


def swap_inputs(
    values: Sequence[Tensor], estimates: Sequence[Tensor], imagined: Sequence[Tensor], examples: int, mean: bool = True
) -> tuple[Tensor, ...]:
    """Return the synthetic inputs; backward, values get their synthetic gradients and both models their fit gradients."""
    swapped: tuple[Tensor, ...] = InputSwap.apply(examples, mean, *values, *estimates, *imagined)  # type: ignore[no-untyped-call]
    return swapped


def fit_gradient(estimate: Tensor, target: Tensor, examples: int) -> Tensor:
    """Gradient, with respect to the estimate, of the fit loss: mean over examples of ||estimate - target||^2.

    Args:
        estimate: Per-example synthetic gradient, [batch, ...].
        target: Per-example target gradient of the same shape.
        examples: Number of examples that the mean runs over.
    """
    return (estimate - target).mul_(2.0 / examples).to(estimate.dtype)


def backpropagate(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], shared: Sequence[Tensor] = ()) -> None:
    """Backpropagate from those of the tensors that carry a graph: a value that was only passed on, detached, carries none.

    To what several backward passes reach, ``shared``, gradients are added in new memory: autograd may leave the gradients of two
    leaves in the same (those of ``torch.stack([a, b]).sum(0)``), where adding to one in place would change the other.
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
    """Let an optimizer use the gradients that are there, and drop them: ``zero_grad`` without its profiling."""
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def per_example(gradient: Tensor, scale: float) -> Tensor:
    """Return the per-example target from the gradient that arrived: at least in single precision, divided by the scale."""
    wide = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
    return wide / scale


class AverageGradient(torch.autograd.Function):
    """Answers with a running average; backward, moves the average by the fit gradient that arrives.

    The gradient of the mean over examples of ||average - target||^2 is 2 (average - mean target), so a step of
    (1 - decay) / 2 against it is exactly the exponential average of the batch means.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, average: Tensor, value: Tensor, decay: float) -> Tensor:
        """Return the average for each example of value, [batch, ...]; anchor only makes autograd come back here."""
        ctx.average = average
        ctx.decay = decay
        return average.expand_as(value).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, fit: Tensor) -> tuple[Any, ...]:
        """Move the average; the anchor's own gradient is zero."""
        ctx.average.sub_(fit.sum(0, keepdim=True), alpha=(1 - ctx.decay) / 2)
        return fit.new_zeros(()), None, None, None


def average_gradient(anchor: Tensor, average: Tensor, value: Tensor, decay: float) -> Tensor:
    """Return the running average of the target gradient, [1, ...], for each example of value, [batch, ...]."""
    answer: Tensor = AverageGradient.apply(anchor, average, value, decay)  # type: ignore[no-untyped-call]
    return answer


def arrived(leaf: Tensor) -> Tensor:
    """Return the gradient that consumers sent to a value, zero where none of them used it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def spread_context(context: Tensor, like: Tensor) -> Tensor:
    """Return the context for every position of a value [batch, ..., features].

    Args:
        context: Features [batch, width], given to each position of an example; or [batch, ..., width], one for each.
        like: The value.
    """
    if context.dim() < like.dim():
        between = [1] * (like.dim() - context.dim())
        context = context.reshape(*context.shape[:-1], *between, context.shape[-1]).expand(*like.shape[:-1], -1)
    return context.to(like.dtype)


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


def token_mean(value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens of a value [batch, length, features]: of those that count, where there is a mask of them."""
    if mask is None or value.shape[:2] != mask.shape:
        return value.mean(1)
    return count_only(value, mask).sum(1) / (mask != 0).sum(1, keepdim=True).clamp(min=1)


def detached(value: Any) -> Any:
    """Detach every tensor in a value: what an operation inside ``torch.no_grad()`` gives."""
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def differentiating(function: Any, *inputs: Any) -> Any:
    """Return what a function gives that differentiates inside; under ``torch.no_grad()`` no graph is left of it."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        values = function(*inputs)
    return values if wanted else detached(values)


def losses_of(loss: Tensor, examples: int, mean: bool = True) -> Tensor:
    """Return one loss an example, [examples]: as they are, or the batch mean for each where the loss is reduced already."""
    wide = loss.detach()
    return wide if wide.dim() else (wide if mean else wide / examples).expand(examples)


def example_losses(loss: Tensor, mean: bool = True) -> Tensor:
    """Return the loss to differentiate: a scalar as it is, one loss an example averaged, or summed where not ``mean``."""
    if loss.dim() == 0:
        return loss
    return loss.mean() if mean else loss.sum()


def compare(estimates: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """Compare synthetic with target gradients, all values of a boundary together.

    Returns:
        ``cosine``: mean over examples of the cosine between estimate and target; ``relative_error``: ||estimate - target|| /
        ||target||; ``wrong_signs``: share of the target's non-zero entries whose sign the estimate does not have;
        ``estimate_norm`` and ``target_norm``: root mean square over examples of the norm. Scalars, on the device.
    """
    estimate = torch.cat([value.detach().reshape(len(value), -1) for value in estimates], 1)
    target = torch.cat([value.detach().reshape(len(value), -1) for value in targets], 1)
    known = target != 0
    wrong = (estimate.sign() != target.sign()) & known
    return {
        "cosine": torch.nn.functional.cosine_similarity(estimate, target, dim=1).mean(),
        "relative_error": (estimate - target).norm() / target.norm(),
        "wrong_signs": wrong.sum() / known.sum(),
        "estimate_norm": estimate.norm(dim=1).square().mean().sqrt(),
        "target_norm": target.norm(dim=1).square().mean().sqrt(),
    }
