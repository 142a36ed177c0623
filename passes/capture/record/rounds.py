"""Records a model: runs it, and runs it again where a run finds that other modules have to be opened or kept whole."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.errors import CaptureError
from dnifx.ir import Kept
from dnifx.passes.capture.record.hazards import Hazard, close_to_line
from dnifx.passes.capture.record.inputs import Call, RecordedSignature, fields_of
from dnifx.passes.capture.record.interpose import interposed
from dnifx.passes.capture.record.leaves import Plan, is_made
from dnifx.passes.capture.record.node_values import Path
from dnifx.passes.capture.record.recorder import Recorder
from dnifx.passes.capture.record.state import Generators, generators, preserved
from dnifx.passes.capture.record.structure import path_name, tensors_in, variables_in
from dnifx.runtime.emitted import ops

_ROUNDS = 12

fx.node.has_side_effect(ops.guard)
fx.node.has_side_effect(ops.guard_length)
fx.node.has_side_effect(ops.set_item)
fx.node.has_side_effect(ops.set_attribute)


@dataclass(frozen=True)
class Recording:
    """One run of a model, written down.

    Attributes:
        graph: The graph over the model's own module paths; its output is a flat tuple.
        signature: How the graph is called.
        constants: Values that the graph reads by flat names and that the model does not hold: attributes of whoever runs it.
        kept: Submodules kept whole, with the reason.
        guards: How many guards the graph holds; one that fails raises ``dnifx.runtime.emitted.ops.GuardError``.
        volatile: How Python's state or random numbers steer an opened module, so that every step has to be recorded anew.
        after: For a volatile recording, the states of all generators after the recorded run. Whoever runs its graph, from the
            state in which it was recorded, hands them to ``state.finish_draws`` afterwards.
        notes: What the graph does otherwise than the model, in words: checkpoints that are not recomputed.
    """

    graph: fx.Graph
    signature: RecordedSignature
    constants: Mapping[str, object]
    kept: tuple[Kept, ...] = ()
    guards: int = 0
    volatile: Hazard | None = None
    notes: tuple[str, ...] = ()
    after: Generators | None = None


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    open_paths: Collection[str] | None = None,
    keep_whole: Collection[str] = (),
) -> Recording:
    """Run a model on example inputs and return the graph of what it did; the model is left as it was.

    Args:
        model: Any module.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        open_paths: The only modules to look into, with their ancestors; all others stay one node. None looks into all.
        keep_whole: Modules that stay one node.

    Raises:
        CaptureError: The model fails on the example inputs, or does something at a place that has to stay open which no
            graph repeats.
        InputError: The model's forward does not take these arguments.
    """
    call = Call.of(model)
    call.bind(tuple(args), kwargs)
    _refuse_lazy(model)
    plan = Plan.start(model, open_paths, keep_whole)
    imports: set[str] = set()
    for _ in range(_ROUNDS):
        recorder, result = _attempt(model, tuple(args), kwargs, plan, call, imports)
        revised = plan.revised(recorder.modules.whole, recorder.leaking)
        if revised != plan or recorder.interrupted:
            plan = revised
            continue
        if isinstance(result, Recording):
            _refuse(model, recorder)
            return result
        raise _failure(model, args, kwargs, result) from result
    raise CaptureError(
        f"{type(model).__name__} asks for ever other modules to be kept whole ({_ROUNDS} runs): {dict(plan.whole)}"
    )


def copied(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with tensors of their own, which a model may write into."""
    held = (tuple(args), dict(kwargs))
    tensors = [tensor for _, tensor in tensors_in(held)]
    fresh = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    made: tuple[tuple[Any, ...], dict[str, Any]] = ops.Template(held, tensors).build(fresh)
    return made


def _attempt(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], plan: Plan, call: Call, imports: set[str]
) -> tuple[Recorder, "Recording | Exception"]:
    own_args, own_kwargs = copied(args, kwargs)
    with preserved(model) as snapshot:
        recorder = Recorder(model, plan, snapshot, imports)
        bound = call.bind(own_args, own_kwargs)
        fields = fields_of(bound)
        names = _place_inputs(recorder, bound)
        try:
            with torch.enable_grad(), interposed(recorder), recorder.escapes, recorder:
                recorder.active = True
                result = model(*own_args, **own_kwargs)
                recorder.active = False
            after = generators()
            template = _write_output(recorder, result)
        except Exception as error:  # noqa: BLE001 - whatever the model raises is reported with its place
            recorder.active = False
            return recorder, error
    plain = not kwargs and len(args) == len(names) and all(isinstance(arg, Tensor) for arg in args)
    modules = tuple(module for path, module in recorder.modules.opened.items() if not is_made(path))
    probe = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    signature = RecordedSignature(names, call, fields, template, plain, modules, probe)
    recording = _recording(recorder, plan, signature)
    return recorder, replace(recording, after=after) if recorder.modules.volatile else recording


def _place_inputs(recorder: Recorder, bound: Mapping[str, Any]) -> tuple[str, ...]:
    names = []
    for field in fields_of(bound):
        if field.dimensions is not None:
            names.append(recorder.writer.placeholder(path_name(field.path), _at(bound, field.path)))
    return tuple(names)


def _at(bound: Any, path: Path) -> Tensor:
    for kind, key in path:
        bound = bound[key] if kind == "item" else getattr(bound, key)
    tensor: Tensor = bound
    return tensor


def _write_output(recorder: Recorder, result: Any) -> ops.Template:
    """End the graph with the variables of the output, and return what builds the output around them."""
    variables = variables_in(result)
    nodes = [recorder.writer.argument(part) for part in variables]
    kept = [(part, node) for part, node in zip(variables, nodes, strict=True) if isinstance(node, fx.Node)]
    recorder.writer.graph.output(tuple(node for _, node in kept))
    return ops.Template(result, [part for part, _ in kept])


def _recording(recorder: Recorder, plan: Plan, signature: RecordedSignature) -> Recording:
    graph = recorder.writer.graph
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    constants = {name: value for name, value in recorder.writer.constants.items() if name in used}
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    kept = tuple(Kept(path, reason) for path, reason in plan.whole.items() if path in called or is_made(path))
    return Recording(
        graph, signature, constants, kept, recorder.checks.guards, recorder.modules.volatile, tuple(recorder.notes)
    )


def _refuse_lazy(model: nn.Module) -> None:
    for path, parameter in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(parameter):
            raise CaptureError(
                f"{type(model).__name__}: the parameter {path!r} has no shape before the first call; run the model once, then decouple it"
            )


def _refuse(model: nn.Module, recorder: Recorder) -> None:
    """Raise the error of what cannot be recorded however the modules are opened."""
    if recorder.modules.failures:
        path, hazard = recorder.modules.failures[0]
        raise CaptureError(
            f"{type(model).__name__} cannot be recorded as a graph: {hazard.construct} in module {path or '<root>'!r}\n"
            f"  at {hazard.line}\nmove this code into a submodule, which can then be kept whole, or cut outside of it"
        )


def _failure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> CaptureError:
    """Return the error of a run that raised: the model's own fault, or recording's."""
    own_args, own_kwargs = copied(args, kwargs)
    try:
        with preserved(model):
            model(*own_args, **own_kwargs)
    except Exception as own:  # noqa: BLE001 - the model's own error is what the user has to see
        return CaptureError(
            f"{type(model).__name__} fails on the example inputs: {type(own).__name__}: {own}\n  at {close_to_line(own)}"
        )
    return CaptureError(
        f"{type(model).__name__} runs, but cannot be recorded: {type(error).__name__}: {error}\n  at {close_to_line(error)}\n"
        "keep the module that holds this line whole, or cut outside of it"
    )
