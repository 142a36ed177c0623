"""The ladder of capture: techniques in order of what they get right, each verified before it is taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError
from dnifx.ir import CONSTANTS, Kept, Program, Signature
from dnifx.passes.exported import export_model
from dnifx.passes.recording import SideBySide, record, under_seeds
from dnifx.passes.recording.state import preserved
from dnifx.passes.symbolic import trace_symbolically
from dnifx.runtime.ops import GuardError

SHOWN = 3
GRAPH_NAMES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))
"""What a graph module keeps for itself, such as ``code``, ``graph`` and ``meta``."""


@dataclass(frozen=True)
class Found:
    """What one rung captured.

    Attributes:
        graph: The graph over the model's own module paths; its output is a flat tuple.
        signature: How it is called.
        constants: Values that it reads and the model does not hold, by the names it reads them by.
        kept: Submodules kept whole, and why.
        guards: How many guards it holds.
        notes: What it does otherwise than the model, in words.
    """

    graph: fx.Graph
    signature: Signature
    constants: Mapping[str, Any]
    kept: tuple[Kept, ...] = ()
    guards: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Climb:
    """The rung that was taken, and those that were not."""

    rung: str
    found: Found
    verified: bool
    tried: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def recorded(program: Program, open_paths: Sequence[str] | None = None, keep_whole: Sequence[str] = ()) -> Found:
    """Run the model once on the example inputs and write down what it does."""
    recording = record(program.model, program.args, program.kwargs, open_paths=open_paths, keep_whole=keep_whole)
    if recording.volatile:
        raise CaptureError(
            f"Python's random numbers or state steer the forward of {type(program.model).__name__}, so that every call takes another "
            f"graph: {recording.volatile}; switch that off, or move that code into a small submodule, which is then kept whole"
        )
    notes = recording.notes
    return Found(recording.graph, recording.signature, recording.constants, recording.kept, recording.guards, notes)


def traced(program: Program) -> Found:
    """Trace the model symbolically by torch.fx."""
    with preserved(program.model):
        trace = trace_symbolically(program.model, program.args, program.kwargs)
    return Found(trace.graph, trace.signature, trace.constants, trace.kept)


def exported(program: Program) -> Found:
    """Export the model by torch.export."""
    with preserved(program.model):
        trace = export_model(program.model, program.args, program.kwargs)
    notes = ("captured by torch.export: hooks that are added later are not seen",)
    return Found(trace.graph, trace.signature, trace.constants, notes=notes)


RUNGS: Mapping[str, Callable[[Program], Found]] = {"export": exported, "symbolic": traced}
"""The techniques that need nothing but the program; those that record take the modules that are opened or kept."""


def climb_ladder(
    program: Program,
    rungs: Sequence[str],
    open_paths: Sequence[str] | None,
    check: bool,
    keep_whole: Sequence[str] = (),
) -> Climb:
    """Return the first rung whose graph does what the model does.

    Raises:
        CaptureError: There is none; the text says what each rung met.
        InputError: The model's forward does not take the example inputs.
    """
    tried: list[tuple[str, str]] = []
    blind = any(tensor.is_meta for tensor in (*program.model.parameters(), *tensors_of(program)))
    notes = ("not verified: tensors on the meta device hold no values",) if blind and check else ()
    for rung in rungs:
        if rung == "record_cuts" and open_paths is None:
            continue
        try:
            opened = open_paths if rung == "record_cuts" else None
            found = RUNGS[rung](program) if rung in RUNGS else recorded(program, opened, keep_whole)
        except CaptureError as error:
            tried.append((rung, str(error)))
            continue
        refuse_names(found.graph, type(program.model).__name__)
        differences = verified(program, found) if check and not blind else []
        if not differences:
            return Climb(rung, found, check and not blind, tuple(tried), notes)
        more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        tried.append((rung, f"it differs from the model: {'; '.join(differences[:SHOWN])}{more}"))
    met = "\n".join(f"  {rung}: {reason}" for rung, reason in tried)
    raise CaptureError(f"{type(program.model).__name__} cannot be captured as a graph that does what it does:\n{met}")


def refuse_names(graph: fx.Graph, model: str) -> None:
    """Raise CaptureError where the graph needs an attribute that a graph module cannot hold or Python cannot write."""
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        parts = str(node.target).split(".")
        wrong = next((part for part in parts if iskeyword(part)), parts[0] if parts[0] in GRAPH_NAMES else None)
        if wrong is not None:
            raise CaptureError(
                f"{model} reads {node.target!r}, and {wrong!r} is a name that generated code cannot use (a Python keyword, or an "
                "attribute of torch.fx's GraphModule); give that attribute of the model another name"
            )


def tensors_of(program: Program) -> list[Tensor]:
    """Return the tensors among the example inputs."""
    leaves = pytree.tree_leaves((program.args, dict(program.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def verified(program: Program, found: Found) -> list[str]:
    """Compare a captured graph with the model under two seeds, one of them on twice the batch where the model takes that.

    A guard may fire under one seed, so that a graph that holds guards meets both with the example inputs.
    """
    model, args, kwargs = program.model, program.args, program.kwargs
    both = SideBySide(model, found.graph, found.constants, found.signature)
    try:
        differences = under_seeds(both, args, kwargs, (0, 1) if found.guards else (0,))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs, forward or backward: {type(error).__name__}: {error}\n"
            "give args= and kwargs= that it trains on"
        ) from error
    if differences:
        return differences
    return at_twice_the_batch(both, program, found.guards > 0)


def at_twice_the_batch(both: SideBySide, program: Program, guarded: bool) -> list[str]:
    """Compare on every example twice; where the model does not take that, under another seed."""
    args, kwargs = twice(program)
    try:
        expected = both.expected(args, kwargs, 1)
    except Exception:  # noqa: BLE001 - any failure of the model means that it does not take them
        return [] if guarded else under_seeds(both, program.args, program.kwargs, (1,))
    try:
        return [f"at twice the batch size, {text}" for text in both.differences(expected, args, kwargs, 1)]
    except GuardError:
        return []


def twice(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs with every example there twice; a tensor that is given twice stays one."""
    sizes = [tensor.shape[0] for tensor in tensors_of(program) if tensor.dim()]
    batch = sizes[0] if sizes else 0

    made: dict[int, Tensor] = {}

    def double(value: Tensor) -> Tensor:
        if not value.dim() or value.shape[0] != batch:
            return value
        if id(value) not in made:
            made[id(value)] = torch.cat([value.detach(), value.detach()]).requires_grad_(value.requires_grad)
        return made[id(value)]

    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, double, (program.args, dict(program.kwargs))
    )
    return doubled


def named_apart(found: Found, situation: int) -> Found:
    """Let a graph read its constants from where a running module keeps them."""
    prefix = f"{CONSTANTS}." + (f"situation{situation}_" if situation else "")
    names = {name: prefix + name.removeprefix(f"{CONSTANTS}.").strip("_") for name in found.constants}
    for node in found.graph.nodes:
        if node.op == "get_attr" and node.target in names:
            node.target = names[node.target]
    return replace(found, constants={names[name]: value for name, value in found.constants.items()})
