"""The ladder of capture: techniques in order of what they get right, each verified before it is taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from keyword import iskeyword
from typing import Any

from torch import fx, nn

from dnifx.errors import CaptureError
from dnifx.ir import CONSTANTS, Kept, Program, Signature
from dnifx.passes.capture.export import export_model
from dnifx.passes.capture.proving import Proof, prove, tensors_of
from dnifx.passes.capture.record import record
from dnifx.passes.capture.record.state import preserved
from dnifx.passes.capture.symbolic import trace_symbolically

SHOWN = 3
GRAPH_NAMES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))
"""What a graph module keeps for itself, such as ``code``, ``graph`` and ``meta``."""


@dataclass(frozen=True)
class Found:
    """What one method captured.

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
class Attempt:
    """The method that was taken, and those that were not."""

    method: str
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


METHODS: Mapping[str, Callable[[Program], Found]] = {"export": exported, "symbolic": traced}
"""The techniques that need nothing but the program; those that record take the modules that are opened or kept."""


def try_methods(
    program: Program,
    methods: Sequence[str],
    open_paths: Sequence[str] | None,
    check: bool,
    keep_whole: Sequence[str] = (),
) -> Attempt:
    """Return the first method whose graph does what the model does.

    Raises:
        CaptureError: There is none; the text says what each method met.
        InputError: The model's forward does not take the example inputs.
    """
    tried: list[tuple[str, str]] = []
    blind = any(tensor.is_meta for tensor in (*program.model.parameters(), *tensors_of(program)))
    notes = ("not verified: tensors on the meta device hold no values",) if blind and check else ()
    for method in methods:
        if method == "record_cuts" and open_paths is None:
            continue
        try:
            opened = open_paths if method == "record_cuts" else None
            found = METHODS[method](program) if method in METHODS else recorded(program, opened, keep_whole)
        except CaptureError as error:
            tried.append((method, str(error)))
            continue
        refuse_names(found.graph, type(program.model).__name__)
        proof = Proof([])
        if check and not blind:
            proof = prove(program, found.graph, found.constants, found.signature, found.guards > 0)
        differences = proof.differences
        if not differences:
            found = replace(found, guards=found.guards + proof.guards)
            return Attempt(method, found, check and not blind, tuple(tried), notes)
        more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        tried.append((method, f"it differs from the model: {'; '.join(differences[:SHOWN])}{more}"))
    met = "\n".join(f"  {method}: {reason}" for method, reason in tried)
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


def named_apart(found: Found, input_kind: int) -> Found:
    """Let a graph read its constants from where a running module keeps them."""
    prefix = f"{CONSTANTS}." + (f"input kind{input_kind}_" if input_kind else "")
    names = {name: prefix + name.removeprefix(f"{CONSTANTS}.").strip("_") for name in found.constants}
    for node in found.graph.nodes:
        if node.op == "get_attr" and node.target in names:
            node.target = names[node.target]
    return replace(found, constants={names[name]: value for name, value in found.constants.items()})
