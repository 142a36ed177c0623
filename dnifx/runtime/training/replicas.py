"""Replicas of a trainer in several processes: refused, unless the user says how they go together."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from dnifx.errors import OptimizerError

Replicas = Literal["average", "apart"]


def averaged(replicas: Replicas | None, net: nn.Module, over_ranks: bool = False) -> bool:
    """Whether gradients are averaged over processes. Where they are, all processes begin with the weights of the first.

    Args:
        replicas: What the user says of them.
        net: The net.
        over_ranks: Whether each process has partitions of its own.

    Raises:
        OptimizerError: There are several processes, and nothing is said of them; or each has other partitions, and they would be averaged.
    """
    if replicas not in (None, "average", "apart"):
        raise OptimizerError(f"replicas={replicas!r}: give 'average', 'apart' or None")
    if over_ranks and replicas == "average":
        raise OptimizerError(
            "replicas='average' takes the mean of all processes' gradients, but with places='ranks' each process has other partitions. "
            "Leave replicas= out, or leave places= out and let each process train the whole net"
        )
    if over_ranks:
        return False
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if world > 1 and replicas is None:
        raise OptimizerError(
            f"torch.distributed runs {world} processes, and a trainer in each would train a net of its own: nothing joins their weights. "
            "Give net.trainer(..., replicas='average') to begin with the weights of process 0 and to average all gradients, or "
            "replicas='apart' where separate nets are meant"
        )
    if replicas != "average" or world == 1:
        return False
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            distributed.broadcast(tensor, 0)
    return True


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes; one that is missing in some of them is zero there."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in kinds.values():
        had = torch.tensor([each.grad is not None for each in group]).to(group[0])
        together = torch.cat([*(dense(each).flatten() for each in group), had])
        distributed.all_reduce(together)
        together /= distributed.get_world_size()
        *parts, counts = torch.split(together, [*(one.numel() for one in group), len(group)])
        for place, (each, part) in enumerate(zip(group, parts, strict=True)):
            if each.grad is not None or counts[place] > 0:
                each.grad = part.view_as(each)


def dense(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, zeros where it has none."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
