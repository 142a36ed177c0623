"""Verifies a captured graph: under other seeds, at twice the batch and at other sizes it has to do what the model does."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from dnifx.ir import Program
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.comparison import Comparison
from dnifx.passes.capture.other_inputs import (
    Arguments,
    Size,
    batch_of,
    elements,
    given_tensors,
    halved,
    resized,
    sizes,
    twice,
)
from dnifx.passes.capture.record.hazards import error_line
from dnifx.passes.capture.refusals import ModelFails, as_sentence
from dnifx.passes.graph import listed
from dnifx.runtime.emitted.ops import GuardError, guard
from dnifx.runtime.net.input_kinds import SIZES_ALONE

KEPT_BYTES = 2**23
"""How much a forward pass on more than the example inputs may keep for a backward pass; beyond that there is no backward pass."""

MOST_OUTCOMES = 8
"""Under how many seeds a graph that holds for one outcome of a draw is tried, until it holds under one."""

MOST_SIZES = 4
"""How many sizes beside the batch are changed, one after the other."""


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        differences: How the graph differs from the model, in words.
        guards: How many guards were added to the graph, for sizes that it holds fixed.
        unsafe: Whether the graph loses state, hooks, or what changes from call to call.
        unfollowed: Attributes whose numbers cannot be inputs: Python takes them in a way that nothing shows.
    """

    differences: list[str]
    guards: int = 0
    unsafe: bool = False
    unfollowed: tuple[str, ...] = ()


def verify_capture(program: Program, captured: CapturedGraph) -> Verification:
    """Compare a captured graph with the model under two seeds, one of them at another batch size where the model takes that.

    A guard may fire under one seed, so a graph with guards is compared under both seeds on the example inputs. Some Python code
    uses a size in a way that no function shows (a slice of a list, NumPy), and the graph then holds that size fixed. Such a
    size is guarded, so that other sizes are another input kind.

    Args:
        program: The model and its example inputs.
        captured: What was captured; guards are written into its graph.

    Raises:
        ModelFails: The model itself fails on the example inputs.
    """
    model, args, kwargs = program.model, program.args, program.kwargs
    both, guarded = Comparison(model, captured), captured.guards > 0
    try:
        differences = both.under_seeds(args, kwargs, seeds_for(captured))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        if both.doing is None:
            raise
        where = f" ({error_line(error)})" if both.doing == "the forward pass" else ""
        raise ModelFails(
            f"{both.doing} of {type(model).__name__}",
            f"{as_sentence(error)}{where}",
            "Give args= and kwargs= that it trains on, and the model in the mode in which it trains",
        ) from error
    differences = differences or at_other_batches(both, program, guarded)
    numbers = {} if differences else both.with_other_numbers(args, kwargs)
    unfollowed = tuple(path for path, texts in numbers.items() if texts)
    differences = differences or [text for texts in numbers.values() for text in texts]
    unsafe = both.unsteady
    if not differences and both.replayed and captured.unused:
        differences, unsafe = [f"what Python makes of the number drawn at {captured.unused[0]} cannot be seen"], True
    if (both.changed or captured.signature.writes) and not differences:
        differences = both.in_sequence(args, kwargs)
        unsafe = bool(differences)
    if differences and both.hooks:
        differences.insert(0, f"forward installs hooks on {listed(list(both.hooks))}, which the graph does not repeat")
    if differences:
        return Verification(differences, unsafe=unsafe or bool(both.hooks), unfollowed=unfollowed)
    inputs = dict(zip(captured.signature.inputs, captured.signature.flatten(args, kwargs), strict=True))
    added = sum(guard_size(captured.graph, inputs, program, size) for size in fixed_sizes(both, program))
    return Verification([], added)


def seeds_for(captured: CapturedGraph) -> tuple[int | None, ...]:
    """Return the seeds to compare under; None stands for the random state of the capture, where a graph of one outcome holds.

    The first that no guard stops says what the graph does for the draws of another call.
    """
    if captured.steered:
        return (*range(MOST_OUTCOMES), None)
    return (0, 1, None) if captured.guards else (0,)


def at_other_batches(both: Comparison, program: Program, guarded: bool) -> list[str]:
    """Compare on every example twice; where that would keep much for a backward pass, compare gradients on half of the examples.

    So a comparison takes no more memory than a training step on the example inputs. Where the model takes neither, the
    example inputs themselves are compared once more, under another seed.
    """
    doubled = first_taken(both, program, twice(program))
    if doubled is not None and (doubled.differences or doubled.backward):
        return [f"at twice the batch size, {text}" for text in doubled.differences]
    half = first_taken(both, program, halved(program))
    if half is not None:
        return [f"at half the batch size, {text}" for text in half.differences]
    return both.under_seeds(program.args, program.kwargs, (1,)) if doubled is None and not guarded else []


@dataclass(frozen=True)
class Trial:
    """How the graph differs from the model on other inputs, and whether that was looked for in a backward pass too."""

    differences: list[str]
    backward: bool


def first_taken(both: Comparison, program: Program, choices: Iterable[Arguments]) -> Trial | None:
    """Compare on the first of these inputs that the model takes; None where it takes none."""
    trials = (compared_on(both, program, arguments) for arguments in choices)
    return next((trial for trial in trials if trial is not None), None)


def compared_on(both: Comparison, program: Program, arguments: Arguments) -> Trial | None:
    """Compare on other inputs; None where the model does not take them. A guard that fires is no difference."""
    larger = elements(arguments) > elements((program.args, program.kwargs))
    number = None if both.steered else 1
    try:
        expected = both.expected(*arguments, number, KEPT_BYTES if larger else None)
    except Exception:  # noqa: BLE001 - any failure of the model means that it does not take them
        return None
    try:
        return Trial(both.differences(expected, *arguments, number), expected.backward)
    except GuardError:
        return Trial([], expected.backward)


def fixed_sizes(both: Comparison, program: Program) -> list[Size]:
    """Return the sizes beside the batch that the graph holds fixed and the model does not.

    On a GPU this is not tried, since an index that no longer fits its tensor would end the process.
    """
    tensors, batch = given_tensors(program), batch_of(program)
    if any(tensor.device.type != "cpu" for tensor in (*tensors, *program.model.parameters())):
        return []
    values = dict.fromkeys(size for tensor in tensors for dim, size in enumerate(sizes(tensor)) if dim or size != batch)
    found: list[Size] = []
    for value in [value for value in values if value][:MOST_SIZES]:
        size = Size(value)
        trial = compared_on(both, program, resized(program, size))
        if trial is None:  # a width and a length that happen to be the same
            alone = [Size(value, dim) for dim in sorted({dim for each in tensors for dim in size.dims(each, batch)})]
            tried = {each: compared_on(both, program, resized(program, each)) for each in alone if len(alone) > 1}
            found += [each for each, one in tried.items() if one is not None and one.differences]
        elif trial.differences:
            found.append(size)
    return found


def guard_size(graph: fx.Graph, inputs: Mapping[str, Any], program: Program, size: Size) -> int:
    """Guard every dimension of the inputs that has this size, and return the number of guards."""
    added = 0
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in [node for node in placeholders if isinstance(inputs[node.name], Tensor)]:
        for dim in size.dims(inputs[node.name], batch_of(program)):
            with graph.inserting_after(placeholders[-1]):
                read = graph.call_method("size", (node, dim))
            where = f"{node.name}.shape[{dim}], which Python code of the model uses"
            with graph.inserting_after(read):
                graph.call_function(guard, (read, size.value, where)).meta[SIZES_ALONE] = True
            added += 1
    return added
