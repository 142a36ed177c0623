"""Replicas of a trainer in several processes: refused, unless the user says how they go together."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from dnifx.engines.base import Engine
from dnifx.engines.ranks import Ranks
from dnifx.errors import OptimizerError
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.shards import Shards
from dnifx.runtime.training.weights import is_sharded

Replicas = Literal["average", "shard", "apart"]


Total = Callable[[Tensor], int]
"""Adds a tensor up over all replicas, in place, and returns how many there are."""


def total_of(replicas: Replicas | None, net: nn.Module, engine: Engine) -> Total | None:
    """Return what adds gradients up over replicas, so that they are averaged; None where they are not.

    Where they are, all replicas begin with the weights of the first.

    Args:
        replicas: What the user says of them.
        net: The net.
        engine: Says whether each process has partitions of its own.

    Raises:
        OptimizerError: There are several processes, and nothing is said of them; or each has other partitions, and they would be averaged.
    """
    if replicas not in (None, "average", "shard", "apart"):
        raise OptimizerError(f"replicas={replicas!r}: give 'average', 'shard', 'apart' or None")
    if engine.ranks is not None:
        return total_of_ranks(replicas, net, engine)
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if world > 1 and replicas is None:
        raise OptimizerError(
            f"torch.distributed runs {world} processes, and a trainer in each would train a net of its own: nothing joins their weights. "
            "Give net.trainer(..., replicas='average') to begin with the weights of process 0 and to average all gradients, or "
            "replicas='apart' where separate nets are meant"
        )
    if replicas != "average" or world == 1:
        return None
    begin_alike(net, 0)
    return over_processes


def total_of_ranks(replicas: Replicas | None, net: nn.Module, engine: Engine) -> Total | None:
    """Return what adds gradients up, where each process has partitions of its own.

    Raises:
        OptimizerError: There is one replica, and it would be averaged; or there are several, and they would not.
    """
    if engine.replicas == 1 and replicas == "average":
        raise OptimizerError(
            "replicas='average' takes the mean of all processes' gradients, but with places='ranks' each process has other partitions. "
            "Leave replicas= out; give mesh=, replicas by places; or leave places= out and let each process train the whole net"
        )
    if engine.replicas > 1 and replicas == "apart":
        raise OptimizerError(
            "replicas='apart' does not go with mesh=, whose replicas average their gradients; leave one out"
        )
    if engine.replicas == 1:
        return None
    begin_alike(net, 0)
    return engine.total


def shards_of(replicas: Replicas | None, net: Net, engine: Engine) -> Shards | None:
    """Return the weights of a net, sharded over replicas; None where each replica has all of them.

    Raises:
        OptimizerError: They cannot be sharded.
    """
    if replicas != "shard" or engine.replicas == 1:
        return None
    reason, where = "", [name for name, each in net.named_parameters() if is_sharded(each)]
    if not isinstance(engine, Ranks):
        reason = "this trainer runs in one process. Give mesh=, replicas by places"
    elif where:
        reason = f"{where[0]!r} is a DTensor already. Give the net as it is before fully_shard, and a net of its own to each trainer"
    elif any(each.is_meta for each in net.parameters()):
        reason = "the model is on the meta device, and FSDP divides weights that have values. Build it on the CPU"
    elif engine.device.type != "cpu":
        reason = f"the model is on {engine.device}, and shards travel over gloo, from CPU to CPU"
    elif any(each.late for each in net.program.interfaces):
        reason = "Late(k) keeps the weights of earlier steps, whole. Take another estimator"
    if reason or not isinstance(engine, Ranks):
        raise OptimizerError(f"replicas='shard' shards weights, and {reason}; or give replicas='average'")
    return Shards(net, engine)


def begin_alike(net: nn.Module, process: int) -> None:
    """Give all processes the weights of one; those on the meta device get theirs later."""
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if not tensor.is_meta:
                distributed.broadcast(tensor, process)


def over_processes(tensor: Tensor) -> int:
    """Add a tensor up over all processes, in place, and return how many there are."""
    distributed.all_reduce(tensor)
    return distributed.get_world_size()


def average(parameters: Iterable[nn.Parameter], total: Total) -> None:
    """Replace gradients by their mean over all replicas; one that is missing in some of them is zero there.

    Those of sharded parameters are means already.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad and not is_sharded(parameter):
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in kinds.values():
        had = torch.tensor([each.grad is not None for each in group]).to(group[0])
        together = torch.cat([*(dense(each).flatten() for each in group), had])
        together /= total(together)
        *parts, counts = torch.split(together, [*(one.numel() for one in group), len(group)])
        for place, (each, part) in enumerate(zip(group, parts, strict=True)):
            if each.grad is not None or counts[place] > 0:
                each.grad = part.view_as(each)


def dense(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, zeros where it has none."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
