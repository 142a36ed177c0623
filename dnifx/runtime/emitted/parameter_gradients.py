"""What estimate and target do to the parameters of the partition that makes a boundary's values; torch alone."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dnifx.runtime.emitted.fitting import wide


def keeping_weights() -> AbstractContextManager[None]:
    """Let a graph that is recorded inside be differentiated again after its weights were updated in place: it keeps copies."""
    return torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor)


def kept(tensor: Tensor) -> Tensor:
    """Return what a graph saves: a copy of a parameter or of a view of one, and any other tensor itself."""
    source = tensor if tensor._base is None else tensor._base
    return tensor.detach().clone() if isinstance(source, nn.Parameter) else tensor


def parameter_cosine(
    values: Sequence[Tensor], parameters: Sequence[Tensor], estimates: Sequence[Tensor], targets: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Compare the gradients that a producer's parameters get from estimates and from targets.

    Args:
        values: A boundary's values, with the graph of the partition that makes them, which stays.
        parameters: What the partition trains.
        estimates: Per-example synthetic gradients of the values.
        targets: Per-example target gradients.

    Returns:
        ``parameter_cosine``: the cosine between the two gradients of all parameters together, a scalar. Nothing where no parameter
        gets a gradient, and where the graph cannot be differentiated twice.
    """
    carrying = [triple for triple in zip(values, estimates, targets, strict=True) if triple[0].requires_grad]
    learned = [each for each in parameters if each.requires_grad]
    if not carrying or not learned:
        return {}
    made, *sides = zip(*carrying, strict=True)
    try:
        estimated, true = (parameter_gradient(made, learned, side) for side in sides)
    except RuntimeError:
        return {}
    return {"parameter_cosine": torch.nn.functional.cosine_similarity(estimated, true, dim=0)}


def parameter_gradient(values: Sequence[Tensor], parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return the gradient of all parameters in one row, from gradients of values."""
    given = [each.detach().reshape(value.shape).to(value.dtype) for value, each in zip(values, gradients, strict=True)]
    found = torch.autograd.grad(
        tuple(values), tuple(parameters), given, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([wide(each.to_dense() if each.is_sparse else each).flatten() for each in found])
