"""The backward passes and updates of a training step."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def backpropagate(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    shared: Sequence[Tensor] = (),
    retain_graph: bool = False,
) -> None:
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
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs], retain_graph)
    for leaf, before in earlier:
        leaf.grad = before if leaf.grad is None else added(before, leaf.grad)


def detached_at(values: Sequence[Any], places: Sequence[int]) -> tuple[Any, ...]:
    """Return values of which some are detached: terms that a partition trains itself, so that the loss does not train them twice."""
    return tuple(value.detach() if place in places else value for place, value in enumerate(values))


def added(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of two gradients; torch adds a sparse one to a dense one, not the other way round."""
    return second + first if first.is_sparse else first + second


def take_gradients(*parameters: Tensor) -> tuple[Tensor | None, ...]:
    """Take the gradients away from parameters."""
    gradients = tuple([each.grad for each in parameters])
    for each in parameters:
        each.grad = None
    return gradients


def give_gradient(parameter: Tensor, *gradients: Tensor | None) -> None:
    """Give a parameter the sum of gradients, added in their order, as backward passes in one process would add them."""
    given = [each for each in gradients if each is not None]
    parameter.grad = reduce(added, given) if given else None


def take_values(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let parameters have new values."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def apply_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Step an optimizer and drop the gradients: ``zero_grad`` without its profiling."""
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
