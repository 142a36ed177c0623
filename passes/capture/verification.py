"""Verifies a captured graph: under other seeds, at twice the batch and at other sizes it has to do what the model does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError
from dnifx.ir import Program
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.comparison import Comparison
from dnifx.passes.graph import example_tensors, listed
from dnifx.runtime.emitted.ops import GuardError, guard
from dnifx.runtime.net.input_kinds import SIZES_ALONE

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
MOST_SIZES = 4
"""How many sizes beside the batch are changed, one after the other."""


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        differences: How the graph differs from the model, in words.
        guards: How many guards were added to the graph, for sizes that it holds fixed.
    """

    differences: list[str]
    guards: int = 0


def verify_capture(program: Program, captured: CapturedGraph) -> Verification:
    """Compare a captured graph with the model under two seeds, one of them on twice the batch where the model takes that.

    A guard may fire under one seed, so a graph with guards is compared under both seeds on the example inputs. Some Python code
    uses a size in a way that no function shows (a slice of a list, NumPy), and the graph then holds that size fixed. Such a
    size is guarded, so that other sizes are another input kind.

    Args:
        program: The model and its example inputs.
        captured: What was captured; guards are written into its graph.

    Raises:
        CaptureError: The model itself fails on the example inputs.
    """
    model, args, kwargs = program.model, program.args, program.kwargs
    both, guarded = Comparison(model, captured), captured.guards > 0
    try:
        differences = both.under_seeds(args, kwargs, (0, 1) if guarded else (0,))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs, forward or backward: {type(error).__name__}: {error}\n"
            "give args= and kwargs= that it trains on"
        ) from error
    differences = differences or at_twice_the_batch(both, program, guarded)
    differences = differences or both.with_other_numbers(args, kwargs)
    if both.changed and not differences:
        differences = both.in_sequence(args, kwargs)
    if differences and both.hooks:
        differences.insert(0, f"forward installs hooks on {listed(list(both.hooks))}, which the graph does not repeat")
    if differences:
        return Verification(differences)
    inputs = dict(zip(captured.signature.inputs, captured.signature.flatten(args, kwargs), strict=True))
    added = sum(guard_size(captured.graph, inputs, program, size) for size in fixed_sizes(both, program))
    return Verification([], added)


def at_twice_the_batch(both: Comparison, program: Program, guarded: bool) -> list[str]:
    """Compare on every example twice; where the model does not take that, under another seed."""
    found = differences_on(both, twice(program))
    if found is None:
        return [] if guarded else both.under_seeds(program.args, program.kwargs, (1,))
    return [f"at twice the batch size, {text}" for text in found]


def differences_on(both: Comparison, arguments: Arguments) -> list[str] | None:
    """Compare on other inputs; None where the model does not take them. A guard that fires is no difference."""
    try:
        expected = both.expected(*arguments, 1)
    except Exception:  # noqa: BLE001 - any failure of the model means that it does not take them
        return None
    try:
        return both.differences(expected, *arguments, 1)
    except GuardError:
        return []


@dataclass(frozen=True)
class Size:
    """A size other than the batch, in every dimension that has it, or in one dimension alone."""

    value: int
    dim: int | None = None

    def dims(self, tensor: Tensor, batch: int) -> list[int]:
        """Return the dimensions of a tensor that have this size."""
        found = [dim for dim, size in enumerate(tensor.shape) if size == self.value and (dim or size != batch)]
        return [dim for dim in found if self.dim in (None, dim)]


def fixed_sizes(both: Comparison, program: Program) -> list[Size]:
    """Return the sizes beside the batch that the graph holds fixed and the model does not.

    On a GPU this is not tried, since an index that no longer fits its tensor would end the process.
    """
    tensors, batch = example_tensors(program), batch_of(program)
    if any(tensor.device.type != "cpu" for tensor in (*tensors, *program.model.parameters())):
        return []
    values = dict.fromkeys(size for tensor in tensors for dim, size in enumerate(tensor.shape) if dim or size != batch)
    found: list[Size] = []
    for value in [value for value in values if value][:MOST_SIZES]:
        size = Size(value)
        differences = differences_on(both, resized(program, size))
        if differences is None:  # a width and a length that happen to be the same
            alone = [Size(value, dim) for dim in sorted({dim for each in tensors for dim in size.dims(each, batch)})]
            found += [each for each in alone if len(alone) > 1 and differences_on(both, resized(program, each))]
        elif differences:
            found.append(size)
    return found


def guard_size(graph: fx.Graph, inputs: Mapping[str, Any], program: Program, size: Size) -> int:
    """Guard every dimension of the inputs that has this size, and return the number of guards."""
    added = 0
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        for dim in size.dims(inputs[node.name], batch_of(program)):
            with graph.inserting_after(placeholders[-1]):
                read = graph.call_method("size", (node, dim))
            where = f"{node.name}.shape[{dim}], which Python code of the model uses"
            with graph.inserting_after(read):
                graph.call_function(guard, (read, size.value, where)).meta[SIZES_ALONE] = True
            added += 1
    return added


def batch_of(program: Program) -> int:
    """Return the number of examples: the first size of the first tensor that has one."""
    return next((tensor.shape[0] for tensor in example_tensors(program) if tensor.dim()), 0)


def twice(program: Program) -> Arguments:
    """Return the example inputs with every example twice."""
    batch = batch_of(program)
    return changed(
        program, lambda value: torch.cat([value, value]) if value.dim() and value.shape[0] == batch else value
    )


def resized(program: Program, size: Size) -> Arguments:
    """Return the example inputs with a size made one smaller wherever it appears; sizes of 1 and 2 are made one larger."""
    batch = batch_of(program)

    def change(value: Tensor) -> Tensor:
        for dim in size.dims(value, batch):
            less = value.narrow(dim, 0, max(size.value - 1, 1))
            value = less if size.value > 2 else torch.cat([value, less.narrow(dim, 0, 1)], dim)
        return value

    return changed(program, change)


def changed(program: Program, change: Callable[[Tensor], Tensor]) -> Arguments:
    """Return the example inputs with every tensor changed; a tensor that is given twice stays one tensor."""
    made: dict[int, Tensor] = {}

    def once(value: Tensor) -> Tensor:
        if id(value) not in made:
            fresh = change(value.detach())
            same = fresh.shape == value.shape
            made[id(value)] = value if same else fresh.contiguous().requires_grad_(value.requires_grad)
        return made[id(value)]

    arguments: Arguments = pytree.tree_map_only(Tensor, once, (program.args, dict(program.kwargs)))
    return arguments
