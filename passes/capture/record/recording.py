"""Records a model: runs it, and runs it again where a run finds that other modules have to be opened or kept whole."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.errors import CaptureError
from dnifx.ir import Kept
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.record.anew import calls_anew
from dnifx.passes.capture.record.attributes import changed_in_place
from dnifx.passes.capture.record.drawing import shown
from dnifx.passes.capture.record.hazards import UnsafeForward, error_line
from dnifx.passes.capture.record.interpose import interposed
from dnifx.passes.capture.record.node_values import Path
from dnifx.passes.capture.record.outside import restored, watching
from dnifx.passes.capture.record.plan import Plan, is_made
from dnifx.passes.capture.record.recorder import Recorder
from dnifx.passes.capture.record.state import preserved
from dnifx.passes.capture.record.structure import copied_arguments, path_name, walk
from dnifx.passes.capture.record.unread import added_unread
from dnifx.passes.capture.refusals import ModelFails, Refused, as_sentence
from dnifx.passes.capture.signature import CapturedSignature, leaves_of
from dnifx.passes.compiled import why_closed
from dnifx.runtime.emitted import ops

_MOST_RUNS = 12

REMEDIES = {
    True: "Move this code into a submodule without a cut inside: it is kept whole, and draws anew in each call. Or compute on tensors: "
    "`x * (torch.rand(len(x), 1) > p)`",
    False: "Move this code into a submodule without a cut inside, which is then kept whole, or cut outside of it",
}
"""What to do about a hazard, by whether it draws."""

fx.node.has_side_effect(ops.call_anew)
fx.node.has_side_effect(ops.guard)
fx.node.has_side_effect(ops.guard_length)
fx.node.has_side_effect(ops.set_item)
fx.node.has_side_effect(ops.set_attribute)


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    open_paths: Collection[str] | None = None,
    keep_whole: Collection[str] = (),
    varying: Collection[str] = (),
    around: Collection[str] | None = None,
    unfollowed: Collection[str] = (),
) -> CapturedGraph:
    """Run a model on example inputs and return the graph of what it did; the model is left as it was.

    Args:
        model: Any module.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        open_paths: The only modules to look into, with their ancestors; all others stay one node. None looks into all.
        keep_whole: Modules that stay one node.
        varying: Attributes whose numbers are inputs, since they change from call to call: ``self.gate.alpha``.
        around: The modules around the cuts, with their ancestors, where these are known.
        unfollowed: Attributes whose numbers are part of the input kind, though they change from call to call.

    Raises:
        CaptureError: The model fails on the example inputs, or a module that has to be opened does something that no
            graph repeats.
        InputError: The model's forward does not take these arguments.
    """
    signature = CapturedSignature.of(model, tuple(args), kwargs)
    plan = Plan.start(model, open_paths, keep_whole, varying, around, unfollowed)
    imports: set[str] = set()
    for _ in range(_MOST_RUNS):
        recorder, result = _run(model, tuple(args), kwargs, plan, signature, imports)
        with_functions = plan.with_functions(recorder.draws.functions, recorder.draws.failed)
        if with_functions != plan:
            plan = with_functions
            continue
        revised = plan.revised(recorder.modules.whole, recorder.leaking, recorder.attributes.carried())
        if revised != plan or recorder.interrupted:
            plan = revised
        elif isinstance(result, CapturedGraph):
            _refuse_hazards(model, recorder)
            return result
        elif isinstance(result, CaptureError):
            raise result
        else:
            raise _failure(model, args, kwargs, result) from result
    raise Refused(
        f"after {_MOST_RUNS} runs there are still other modules to keep whole, of late {list(plan.whole)[-1]!r}",
        "Cut outside of it",
    )


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
    signature: CapturedSignature,
    imports: set[str],
) -> tuple[Recorder, CapturedGraph | Exception]:
    """Record one run; return the recorder with the graph, or with what the run raised."""
    own_args, own_kwargs = copied_arguments(args, kwargs)
    with preserved(model) as snapshot:
        snapshot.reach((own_args, own_kwargs))
        given = dict(walk(signature.call.named(own_args, own_kwargs)))
        recorder = Recorder(model, plan, snapshot, imports)
        writer = recorder.writer
        inputs = [writer.input(name, tensor) for name, tensor in signature.tensors(own_args, own_kwargs)]
        standins = [*calls_anew(recorder.draws, model), *(shown(recorder.draws, each) for each in plan.functions)]
        try:
            watch = watching(model, recorder, snapshot)
            with torch.enable_grad(), interposed(recorder, standins), watch, recorder.unseen, recorder:
                recorder.active = True
                result = model(*own_args, **own_kwargs)
                recorder.active = False
            filled = dict(walk(signature.call.named(own_args, own_kwargs)))
            refuse_filled_arguments([*given.values(), *map(itemgetter(1), walk(result))], filled)
            outputs = writer.variables(result)
            opened = set(map(id, recorder.modules.opened.values()))
            changes = snapshot.changes()
            recorder.attributes.refilled(
                snapshot, changes, opened, lambda at: added_unread(model, at, args, kwargs, snapshot.outside)
            )
            writes, left = recorder.attributes.writes(bool(snapshot.new_hooks()))
            in_place = changed_in_place(changes, writes)
            writer.graph.output((*(node for _, node in outputs), *left))
            output = FirstOutputs(ops.Template(result, [part for part, _ in outputs]).build, len(outputs))
        except Exception as error:  # noqa: BLE001 - whatever the model raises is reported with its place
            recorder.active = False
            return recorder, error
    modules = tuple(module for path, module in recorder.modules.opened.items() if not is_made(path))
    attributes = recorder.attributes
    held, numbers = attributes.held.values(), attributes.numbers.values()
    inputs += [name for *_, names in held for name in names] + [name for _, name in numbers]
    order_inputs(writer.graph, inputs)
    signature = replace(
        signature,
        inputs=tuple(inputs),
        leaves=leaves_of(signature.call.named(args, kwargs) | {at.path: value for at, value, _ in held}),
        output=output,
        modules=modules,
        fixed=attributes.all_fixed(),
        held=tuple(at for at, *_ in held),
        numbers=tuple(at for at, _ in numbers),
        writes=tuple(writes),
        outside=snapshot.outside,
        in_place=in_place,
        asked=tuple(attributes.asked),
        learners=tuple(model.parameters()) if "requires_grad" in attributes.asked else (),
    )
    return recorder, _captured(model, recorder, plan, signature)


def refuse_filled_arguments(known: Iterable[Any], now: Mapping[Path, Any]) -> None:
    """Raise UnsafeForward where a run left a tensor in one of its arguments, such as a list that collects features.

    Args:
        known: What the arguments held before, and what the output holds: a cache that is given, filled and returned.
        now: The leaves of the arguments, by path.
    """
    seen = set(map(id, known))
    for path, leaf in now.items():
        if isinstance(leaf, Tensor) and id(leaf) not in seen:
            raise UnsafeForward(
                f"forward leaves a tensor in its argument {path_name(path)!r}, and no graph repeats that",
                "Return the tensor, or assign it to an attribute of the model",
            )


@dataclass(frozen=True)
class FirstOutputs:
    """Builds the model's output from the first of the graph's outputs; what forward leaves on the model follows them."""

    build: Callable[[Sequence[Any]], Any]
    count: int

    def __call__(self, values: Sequence[Any]) -> Any:
        """Return the output."""
        return self.build(values[: self.count])


def order_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Put the inputs of a graph into this order."""
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for before, after in pairwise(names):
        nodes[before].append(nodes[after])


def _captured(model: nn.Module, recorder: Recorder, plan: Plan, signature: CapturedSignature) -> CapturedGraph:
    """Return the recorded graph without reads that nothing uses."""
    graph = recorder.writer.graph
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    used = {op: {node.target for node in graph.nodes if node.op == op} for op in ("get_attr", "call_module")}
    constants = {name: value for name, value in recorder.writer.constants.items() if name in used["get_attr"]}
    whole = dict(plan.whole) | closed(model)
    kept = tuple(Kept(path, why) for path, why in whole.items() if path in used["call_module"] or is_made(path))
    steered, notes = tuple(recorder.modules.steered), tuple(recorder.notes)
    guards = recorder.guards
    return CapturedGraph(graph, signature, constants, kept, guards.count, notes, steered, tuple(guards.unused))


def closed(model: nn.Module) -> dict[str, str]:
    """Return the paths of the modules that cannot be looked into and that no other such module holds, and why."""
    found = {path: why for path, module in model.named_modules() if (why := why_closed(module))}
    return {path: why for path, why in found.items() if not any(path.startswith(f"{outer}.") for outer in found)}


def _refuse_hazards(model: nn.Module, recorder: Recorder) -> None:
    """Raise CaptureError where a module that has to be opened does something that a graph does not repeat."""
    if recorder.modules.failures:
        unsafe = (each for each in recorder.modules.failures if each[1].unsafe)
        path, hazard = next(unsafe, recorder.modules.failures[0])
        where = f"in module {path!r}" if path else "in forward"
        kind = UnsafeForward if hazard.unsafe else Refused
        raise kind(f"no graph repeats {hazard.construct}, {where} ({hazard.line})", REMEDIES[hazard.draws])


def _failure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> CaptureError:
    """Return the error for a run that raised: the fault is the model's own, or the recorder's."""
    own_args, own_kwargs = copied_arguments(args, kwargs)
    try:
        with restored(model):
            model(*own_args, **own_kwargs)
    except Exception as own:  # noqa: BLE001 - the model's own error is what the user has to see
        return ModelFails(
            type(model).__name__,
            f"{as_sentence(own)} ({error_line(own)})",
            "Give args= and kwargs= with which model(*args, **kwargs) runs",
        )
    return Refused(
        f"it runs, but recording it fails with {as_sentence(error)} ({error_line(error)})",
        "Move the code of that line into a submodule without a cut inside, which is then kept whole, or cut outside of it",
    )
