"""The capture methods. They are tried in order, and the first one whose graph does what the model does is taken."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from dnifx.errors import CaptureError
from dnifx.ir import Capture, Program
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.export import export_model
from dnifx.passes.capture.record.attributes import reads_of
from dnifx.passes.capture.record.hazards import UnsafeForward
from dnifx.passes.capture.record.outside import restored
from dnifx.passes.capture.record.recording import record
from dnifx.passes.capture.refusals import ModelFails, Refused, no_method
from dnifx.passes.capture.symbolic import trace_symbolically
from dnifx.passes.capture.verification import Verification, verify_capture
from dnifx.passes.graph import is_on_meta, listed


def recorded(
    program: Program,
    open_paths: Sequence[str] | None = None,
    keep_whole: Sequence[str] = (),
    varying: Sequence[str] = (),
    around: Sequence[str] | None = None,
    unfollowed: Sequence[str] = (),
) -> CapturedGraph:
    """Run the model once on the example inputs and write down what it does."""
    return record(
        program.model,
        program.args,
        program.kwargs,
        open_paths=open_paths,
        keep_whole=keep_whole,
        varying=varying,
        around=around,
        unfollowed=unfollowed,
    )


def traced(program: Program) -> CapturedGraph:
    """Trace the model symbolically by torch.fx."""
    with restored(program.model) as kept, kept.watching():
        return with_reads(trace_symbolically(program.model, program.args, program.kwargs), program)


def exported(program: Program) -> CapturedGraph:
    """Export the model by torch.export."""
    with restored(program.model) as kept:
        kept.save_plain()  # torch.export writes to them, and no dispatch mode may look on
        return with_reads(export_model(program.model, program.args, program.kwargs), program)


def with_reads(found: CapturedGraph, program: Program) -> CapturedGraph:
    """Let what the model's Python reads be part of the input kind, since the graph holds it fixed."""
    try:
        reads, in_place = reads_of(program.model, program.args, program.kwargs)
    except Exception:  # noqa: BLE001 - verification, or the measure, tells of a model that fails on its example
        return found
    return replace(found, signature=replace(found.signature, fixed=reads, in_place=in_place))


METHODS: Mapping[str, Callable[[Program], CapturedGraph]] = {"export": exported, "symbolic": traced}
"""The methods that need the program alone. ``record`` and ``record_cuts`` also take the modules to open or to keep whole."""


def try_methods(
    program: Program,
    methods: Sequence[str],
    open_paths: Sequence[str] | None,
    check: bool,
    keep_whole: Sequence[str] = (),
    varying: Sequence[str] = (),
) -> tuple[CapturedGraph, Capture]:
    """Return the first graph that does what the model does, and how it was captured.

    What recording refuses because of draws, effects or state, no other method may take: it might hold them fixed.

    Raises:
        CaptureError: No method gives one; the text says what was wrong with each.
        InputError: The model's forward does not take the example inputs.
    """
    refuse_lazy(program)
    tried: list[tuple[str, CaptureError]] = []
    unsafe: tuple[str, CaptureError] | None = None
    on_meta = is_on_meta(program)
    if on_meta:  # operations import it there, and it would keep what stands in for torch's functions while one records
        importlib.import_module("torch._dynamo")
    for method in methods:
        if (method == "record_cuts" and open_paths is None) or (unsafe and method in METHODS):
            continue
        try:
            opened = open_paths if method == "record_cuts" else None
            record = partial(recorded, program, opened, keep_whole, varying, open_paths)
            found = METHODS[method](program) if method in METHODS else record()
        except ModelFails:
            raise
        except CaptureError as error:
            tried.append((method, error))
            unsafe = unsafe or (tried[-1] if isinstance(error, UnsafeForward) else None)
            continue
        verified = check and not on_meta
        verification = verify_capture(program, found) if verified else Verification([])
        if verification.unfollowed:  # then each value of theirs is an input kind
            found = record(unfollowed=verification.unfollowed)
            verification = verify_capture(program, found)
        differences = verification.differences
        if not differences:
            unverified = (
                ("the graph is not verified: tensors on the meta device hold no values",) if on_meta and check else ()
            )
            found = replace(found, guards=found.guards + verification.guards, notes=found.notes + unverified)
            return found, Capture(method, found.kept, verified, met(tried), found.guards, found.steered)
        tried.append((method, differs(differences)))
        unsafe = unsafe or (tried[-1] if verification.unsafe else None)
    raise no_method(type(program.model).__name__, [unsafe] if unsafe else tried)


def met(tried: Sequence[tuple[str, CaptureError]]) -> tuple[tuple[str, str], ...]:
    """Return what each method met, as text."""
    return tuple((method, str(error)) for method, error in tried)


def differs(differences: Sequence[str]) -> Refused:
    """Return the refusal of a method whose graph does something else than the model."""
    return Refused(
        f"its graph differs from the model: {listed(differences, 1)}",
        "Something in forward is not seen (Python state, C code). Move it into a submodule without a cut inside, which is then kept whole",
    )


def refuse_lazy(program: Program) -> None:
    """Raise CaptureError where a parameter has no shape yet."""
    for path, parameter in (*program.model.named_parameters(), *program.model.named_buffers()):
        if nn.parameter.is_lazy(parameter):
            raise CaptureError(
                f"{type(program.model).__name__} cannot be captured: the parameter {path!r} has no shape before the first call. Run the "
                "model once, then decouple it"
            )


def with_constant_paths(found: CapturedGraph, input_kind: int) -> CapturedGraph:
    """Keep the constants of each input kind apart, where the decoupled module holds them all."""
    if not input_kind:
        return found
    paths = {path: path.replace(".", f".kind{input_kind}_") for path in found.constants}
    for node in found.graph.nodes:
        if node.op == "get_attr" and node.target in paths:
            node.target = paths[node.target]
    return replace(found, constants={paths[path]: value for path, value in found.constants.items()})
