"""The tensors of a net by name, which partitions read them, and which lie in the same memory."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dnifx.ir import Program
from dnifx.runtime.net.absent import Absent


def shared_memory(net: nn.Module) -> frozenset[int]:
    """Return the memory that several tensors of a net lie in: freed and held again, they would no longer share it."""
    seen: dict[int, set[int]] = {}
    for _, each in named_tensors(net):
        absent = isinstance(each, Absent) or each.is_meta or is_sharded(each)
        if not absent and each.layout is torch.strided:
            seen.setdefault(each.untyped_storage().data_ptr(), set()).add(id(each))
    return frozenset(place for place, tensors in seen.items() if len(tensors) > 1)


def named_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return all parameters and buffers of a net by each of their names."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


def read_names(program: Program, partitions: set[int], names: Iterable[str]) -> set[str]:
    """Return those of the names of parameters and buffers that the nodes of some partitions read."""
    inside: dict[str, list[str]] = {}
    for name in names:
        steps = name.split(".")
        for depth in range(1, len(steps) + 1):
            inside.setdefault(".".join(steps[:depth]), []).append(name)
    found: set[str] = set()
    for node in program.graph.nodes if program.graph is not None else ():
        homes = {program.partition_of.get(each.name) for each in (node, *(node.users if node.op == "get_attr" else ()))}
        if homes & partitions and node.op in ("get_attr", "call_module"):
            found.update(inside.get(str(node.target), ()))
    return found


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one that processes share (a ``DTensor``); its module is not imported to find that out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
