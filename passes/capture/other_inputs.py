"""Inputs like the example's with other sizes, on which a captured graph is compared with the model too."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dnifx.ir import Program
from dnifx.passes.capture.record.structure import tensors_in
from dnifx.runtime.emitted.ops import Template

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_PLAIN_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
"""Layouts that a tensor keeps when it is made dense, resized and made sparse again."""


@dataclass(frozen=True)
class Size:
    """A size other than the batch, in every dimension that has it, or in one dimension alone."""

    value: int
    dim: int | None = None

    def dims(self, tensor: Tensor, batch: int) -> list[int]:
        """Return the dimensions of a tensor that have this size."""
        found = [dim for dim, size in enumerate(sizes(tensor)) if size == self.value and (dim or size != batch)]
        return [dim for dim in found if self.dim in (None, dim)]


def given_tensors(program: Program) -> list[Tensor]:
    """Return the tensors among the example inputs, also those that objects hold."""
    return [tensor for _, tensor in tensors_in((program.args, dict(program.kwargs)))]


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """Return the sizes of a tensor; nothing for a nested tensor, whose rows differ in length."""
    return () if tensor.is_nested else tuple(tensor.shape)


def batch_of(program: Program) -> int:
    """Return the number of examples: the first size of the first tensor that has one."""
    return next((sizes(tensor)[0] for tensor in given_tensors(program) if sizes(tensor)), 0)


def elements(arguments: Any) -> int:
    """Return how many numbers the tensors among arguments hold."""
    return sum(tensor.numel() for _, tensor in tensors_in(arguments))


def twice(program: Program) -> list[Arguments]:
    """Return the example inputs with every example twice.

    A second choice, where another dimension has the size of the batch too, is larger in each of these: the nodes of a graph
    and its adjacency.
    """
    return _on_batch(program, lambda value, dim: torch.cat([value, value], dim))


def halved(program: Program) -> list[Arguments]:
    """Return the first half of the examples, with the choices of ``twice``.

    Nothing is returned where there is one example only, or where an input may hold places among the examples.
    """
    batch = batch_of(program)
    half = batch // 2
    if not half or holds_places(program, half, batch):
        return []
    return _on_batch(program, lambda value, dim: value.narrow(dim, 0, half))


def holds_places(program: Program, least: int, size: int) -> bool:
    """Whether an input of whole numbers may hold places or lengths in a dimension of this size that need at least so much of it.

    Some operations of torch, those of sparse tensors among them, read outside of a tensor where a place does not fit it.
    """
    for tensor in given_tensors(program):
        if tensor.dtype in (torch.int32, torch.int64) and sizes(tensor) and tensor.numel():
            numbers = tensor.to_dense() if tensor.layout is not torch.strided else tensor
            if least <= int(numbers.max()) <= size or (tensor.dim() == 1 and int(numbers.sum()) == size):
                return True
    return False


def _on_batch(program: Program, change: Callable[[Tensor, int], Tensor]) -> list[Arguments]:
    """Change the batch dimension, then each dimension that has the size of the batch if there are others."""
    batch = batch_of(program)

    def on_batch(most: int | None, value: Tensor) -> Tensor:
        for dim in [dim for dim, size in enumerate(value.shape[:most]) if size == batch]:
            value = change(value, dim)
        return value

    others = any(batch in sizes(tensor)[1:] for tensor in given_tensors(program))
    return [changed(program, partial(on_batch, most)) for most in (1, None)[: 1 + others]]


def resized(program: Program, size: Size) -> Arguments:
    """Return the example inputs with a size made one smaller wherever it appears.

    Sizes of 1 and 2, and those in which an input may hold the last place, are made one larger.
    """
    batch = batch_of(program)
    grows = size.value <= 2 or holds_places(program, size.value - 1, size.value)

    def change(value: Tensor) -> Tensor:
        for dim in size.dims(value, batch):
            less = value.narrow(dim, 0, max(size.value - 1, 1))
            value = torch.cat([value, less.narrow(dim, 0, 1)], dim) if grows else less
        return value

    return changed(program, change)


def changed(program: Program, change: Callable[[Tensor], Tensor]) -> Arguments:
    """Return the example inputs with every tensor changed; a tensor that is given twice stays one tensor."""
    held: tuple[tuple[Any, ...], Mapping[str, Any]] = (program.args, dict(program.kwargs))
    tensors = [tensor for _, tensor in tensors_in(held)]
    arguments: Arguments = Template(held, tensors).build([_changed(tensor, change) for tensor in tensors])
    return arguments


def _changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor changed, in its own layout; the tensor itself where its shape stays."""
    strided = tensor.layout is torch.strided
    if tensor.is_nested or not (strided or tensor.layout in _PLAIN_SPARSE):
        return tensor
    fresh = change(tensor.detach() if strided else tensor.detach().to_dense())
    if fresh.shape == tensor.shape:
        return tensor
    fresh = fresh.contiguous() if strided else fresh.to_sparse(layout=tensor.layout)
    return fresh.requires_grad_(tensor.requires_grad)
