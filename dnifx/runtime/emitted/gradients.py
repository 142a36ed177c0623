"""What estimators call: gradients that they compute themselves, contexts, masks. Imports torch, the errors and ``fitting`` alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dnifx.errors import EstimatorError
from dnifx.runtime.emitted.fitting import count_only, wide


class OwnGradient(torch.autograd.Function):
    """Answers with known gradients; backward, it minimises the losses, whose factor is the largest number that arrives."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients, in a precision that holds a loss scale."""
        ctx.save_for_backward(losses)
        return tuple(wide(gradient).clone() for gradient in gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Give the losses the gradient of their mean, times the loss scale."""
        (losses,) = ctx.saved_tensors
        factor = torch.stack([each.amax() for each in arriving if each.numel()]).amax() / losses.numel()
        return factor.expand_as(losses).to(losses.dtype), *(None for _ in arriving)


class KnownGradients(torch.autograd.Function):
    """Answers with known gradients; backward, it gives parameters theirs, times the largest number that arrives."""

    @staticmethod
    def forward(
        ctx: Any, answers: Sequence[Tensor], fits: Sequence[Tensor], examples: int, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the answers, in a precision that holds a loss scale; ``fits`` are the gradients of all examples' losses."""
        ctx.save_for_backward(*fits)
        ctx.examples = examples
        return tuple(wide(answer).clone() for answer in answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """Give each parameter the gradient of the mean of the losses, times the loss scale."""
        factor = torch.stack([each.amax() for each in arriving if each.numel()]).amax() / ctx.examples
        return None, None, None, *(fit * factor.to(fit.dtype) for fit in ctx.saved_tensors)


def leaf(value: Tensor) -> Tensor:
    """Return a detached value to differentiate with respect to."""
    return value.detach().requires_grad_()


def own_gradients(
    losses: Tensor, leaves: Sequence[Tensor], factor: int = 1, parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Return the gradient of each example's own loss, [batch], with respect to leaves, times a factor. Its fit minimises that loss.

    Nothing may be multiplied into what is returned: the loss scale comes back there as the gradient.

    Args:
        losses: One for each example.
        leaves: The values.
        factor: What the answers are multiplied by.
        parameters: What the fit trains. One backward pass finds their gradients and the answers. It lets the graph go. Without them,
            and in half precision, where small gradients need the loss scale, the fit makes a second pass through all of the graph.
    """
    at_once = (
        [] if torch.float16 in {*map(computed_in, leaves)} else [each for each in parameters if each.requires_grad]
    )
    if not at_once or not torch.is_grad_enabled():
        found = torch.autograd.grad(losses.sum(), tuple(leaves), retain_graph=True, materialize_grads=True)
        answer: tuple[Tensor, ...] = OwnGradient.apply(losses, *times(found, factor))  # type: ignore[no-untyped-call]
        return answer
    made = torch.autograd.grad(losses.sum(), (*leaves, *at_once), allow_unused=True)
    pairs = list(zip(at_once, made[len(leaves) :], strict=True))
    refuse_shards(each for each, fit in pairs if fit is None)
    known = [(each, fit) for each, fit in pairs if fit is not None] or [(at_once[0], torch.zeros_like(at_once[0]))]
    found = tuple(torch.zeros_like(each) if own is None else own for each, own in zip(leaves, made, strict=False))
    fits, trained = [fit for _, fit in known], [each for each, _ in known]
    answer = KnownGradients.apply(times(found, factor), fits, losses.numel(), *trained)  # type: ignore[no-untyped-call]
    return answer


def refuse_shards(unread: Iterable[Tensor]) -> None:
    """Raise EstimatorError where parameters that an estimator's own loss did not read are shards: it read what was gathered."""
    if any(hasattr(each, "full_tensor") for each in unread):
        raise EstimatorError(
            "a module inside of an estimator is sharded by itself (fully_shard), so its fit would be lost. Shard modules of the model, "
            "then the net as a whole: fully_shard(net) takes the estimators with it"
        )


def computed_in(value: Tensor) -> torch.dtype:
    """Return the precision in which a value is computed with: its own, or that of autocast."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def times(gradients: Sequence[Tensor], factor: int) -> tuple[Tensor, ...]:
    """Return gradients times a factor."""
    return tuple(gradients) if isinstance(factor, int) and factor == 1 else tuple(each * factor for each in gradients)


def predicted_gradients(losses: Tensor, leaves: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
    """Return the gradient of each example's predicted loss, [batch], with respect to leaves; ``keep`` keeps its graph."""
    return torch.autograd.grad(losses.sum(), tuple(leaves), retain_graph=True, create_graph=keep)


class AverageGradient(torch.autograd.Function):
    """Answers with a running average; backward, moves the average by the fit gradient that arrives.

    The gradient of the mean over examples of ||average - target||^2 is 2 (average - mean target), so a step of
    (1 - decay) / 2 against it is exactly the exponential average of the batch means.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, average: Tensor, value: Tensor, decay: float) -> Tensor:
        """Return the average for each example of value, [batch, ...]. The anchor only makes autograd come back here."""
        ctx.average, ctx.decay = average, decay
        return average.expand_as(value).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, fit: Tensor) -> tuple[Any, ...]:
        """Move the average, unless the fit is not finite; the anchor's own gradient is zero."""
        move = fit.sum(0, keepdim=True)
        fine = torch.where(move.isfinite().all(), move, torch.zeros_like(move))
        ctx.average.sub_(fine, alpha=(1 - ctx.decay) / 2)
        return fit.new_zeros(()), None, None, None


def average_gradient(anchor: Tensor, average: Tensor, value: Tensor, decay: float) -> Tensor:
    """Return the running average of the target gradient, [1, ...], for each example of value, [batch, ...]."""
    answer: Tensor = AverageGradient.apply(anchor, average, value, decay)  # type: ignore[no-untyped-call]
    return answer


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


def token_mean(value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens of a value [batch, length, features]; with a mask, over those that count."""
    if mask is None or value.shape[:2] != mask.shape:
        return value.mean(1)
    return count_only(value, mask).sum(1) / (mask != 0).sum(1, keepdim=True).clamp(min=1)


def head_input(value: Tensor, label: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Return what a head sees of tokens [batch, length, features]: each, where each has a label, and else their mean."""
    return value if label is not None and label.dim() > 2 else token_mean(value, mask)


def by_position(logits: Tensor, like: Tensor) -> Tensor:
    """Return logits [positions, classes] in the leading sizes of a value [batch, ..., features]."""
    return logits.reshape(*like.shape[:-1], logits.shape[-1])


def labelled_rows(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and labels as rows, [examples or positions, classes] both.

    Args:
        logits: [batch, classes], or [batch, ..., classes] for one answer a token or pixel. Images of another size than the
            labels are interpolated.
        label: One-hot, [batch, ..., classes].

    Raises:
        EstimatorError: The head answers for other positions than the labels have.
    """
    if logits.dim() == label.dim() == 4 and logits.shape[1:3] != label.shape[1:3]:
        sized = functional.interpolate(logits.movedim(-1, 1), label.shape[1:3], mode="bilinear", align_corners=False)
        logits = sized.movedim(1, -1)
    if logits.shape[:-1] != label.shape[:-1]:
        raise EstimatorError(
            f"the head answers with logits {tuple(logits.shape)}, and the labels are {tuple(label.shape[:-1])}: there has to be one answer "
            "for each label. For one label a pixel give head=dnifx.estimators.Head(pool=None); for other labels give a head of your own, "
            "or gradient='suffix', which learns from your own loss"
        )
    return logits.flatten(0, -2), label.flatten(0, -2)


def position_mean(losses: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the loss of each example, [batch]: the mean over its tokens or pixels, where each has a label.

    Args:
        losses: One for each row of ``labelled_rows``.
        label: [batch, ..., classes].
        mask: Which tokens count, [batch, length].
    """
    if label.dim() <= 2:
        return losses
    apart = losses.reshape(len(label), -1)
    if mask is None or mask.shape != label.shape[:-1]:
        return apart.mean(1)
    return count_only(apart.unsqueeze(-1), mask).sum((1, 2)) / (mask != 0).sum(1).clamp(min=1)


def through(layers: nn.Sequential, value: Tensor) -> Tensor:
    """Run layers one after the other; batch norm takes batches of any size, and keeps no average that is not finite."""
    for layer in layers:
        value = normalised(layer, value) if isinstance(layer, _BatchNorm) else layer(value)
    return value


def normalised(norm: _BatchNorm, value: Tensor) -> Tensor:
    """Normalise a batch.

    A batch with one value for each channel has no variance: it is normalised by the running averages, and does not move them.
    Neither does a batch whose averages are not finite.
    """
    mean, variance = norm.running_mean, norm.running_var
    if not norm.training or mean is None or variance is None:
        answer: Tensor = norm(value)
        return answer
    options = norm.weight, norm.bias
    if value.numel() == value.shape[1]:
        return functional.batch_norm(value, mean, variance, *options, False, 0.0, norm.eps)
    moved = mean.clone(), variance.clone()
    answer = functional.batch_norm(value, *moved, *options, True, norm.momentum or 0.0, norm.eps)
    with torch.no_grad():
        fine = moved[0].isfinite().all() & moved[1].isfinite().all()
        mean.copy_(torch.where(fine, moved[0], mean))
        variance.copy_(torch.where(fine, moved[1], variance))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += fine
    return answer
