"""Measure: shapes, dtypes, FLOPs, bytes, aliases and in-place writes of every node, by a run on fake tensors."""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from dnifx.errors import CaptureError
from dnifx.ir import Holder, Measure, Program, TensorSpec
from dnifx.passes.capture.record.generators import python_draws, seed
from dnifx.passes.capture.record.state import preserved, storage_of
from dnifx.passes.capture.record.structure import copied_arguments, dense_parts, tensors_in
from dnifx.passes.capture.refusals import as_sentence
from dnifx.passes.capture.verification import MOST_OUTCOMES
from dnifx.passes.flops import OperationCounter
from dnifx.passes.graph import captured, computing, copied, described, input_names, is_on_meta, listed, memory_written
from dnifx.passes.pipeline import Pass
from dnifx.passes.torch_logging import quiet_loggers
from dnifx.runtime.emitted.ops import call_anew, guard, guard_length

NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""Errors of a run on fake tensors which mean that a node needs the values of its tensors."""


OF_TORCH = ("aten", "prims", "prim", "quantized", "torchvision")
"""The namespaces of operators that compute their value and do nothing else."""


@dataclass(frozen=True)
class MeasureNodes(Pass):
    """Run the graph on fake tensors, which computes nothing, and write down what each node costs.

    Where a node needs the values of its tensors, the graph is run once for real, and the model is restored.
    """

    name: ClassVar[str] = "measure"
    requires: ClassVar[tuple[str, ...]] = ("graph", "signature")
    ensures: ClassVar[tuple[str, ...]] = ("measures",)

    def run(self, program: Program) -> Program:
        """Measure every node, let later readers of a written tensor read the write's result, and drop unused nodes."""
        try:
            measured = replace(program, measures=measure_on_fakes(program))
        except (*NEEDS_VALUES, CaptureError) as error:
            if isinstance(error, CaptureError) and is_on_meta(program):
                raise
            reason = f"the graph does not run on fake tensors ({type(error).__name__}: {error}".splitlines()[0]
            note = f"{reason}), so it was measured by a real run of the example inputs"
            measured = replace(program, measures=measure_for_real(program), notes=(*program.notes, note))
        graph = with_writes_read(copied(captured(program)), measured.measures)
        return without_unused(replace(measured, graph=graph))


def without_unused(program: Program) -> Program:
    """Drop the operations whose value nothing uses, unless they draw random numbers, write, or update buffers."""
    graph = captured(program)
    dropped = []
    for node in reversed(graph.nodes):
        if not node.users and node.op != "output" and is_pure(program, node):
            dropped.append(node.name)
            graph.erase_node(node)
    tensors = [name for name in reversed(dropped) if program.measures[name].is_tensor]
    measures = {name: measure for name, measure in program.measures.items() if name not in set(dropped)}
    note = (f"nothing uses {listed(tensors)}: not computed",) if tensors else ()
    return replace(program, measures=measures, notes=program.notes + note)


def is_pure(program: Program, node: fx.Node) -> bool:
    """Whether a node does nothing but compute its value."""
    measure = program.measures[node.name]
    if node.op == "placeholder" or measure.random or measure.writes:
        return False
    if node.op == "call_module":
        module = program.model.get_submodule(str(node.target))
        return (
            all(type(each).__module__.startswith("torch.nn.") for each in module.modules())
            and next(module.buffers(), None) is None
            and not module._forward_hooks
            and not module._forward_pre_hooks
        )
    return node.op == "get_attr" or not (node.is_impure() or is_custom(node))


def is_custom(node: fx.Node) -> bool:
    """Whether a node calls an operator that torch does not define, which may act by its effect."""
    target = node.target if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket) else None
    return target is not None and str(target).partition(".")[0] not in OF_TORCH


def with_writes_read(graph: fx.Graph, measures: Mapping[str, Measure]) -> fx.Graph:
    """Let what reads a tensor after an in-place write read the write's result, where that is the same tensor."""
    for node in graph.nodes:
        for target in node.all_input_nodes if node.op != "output" and measures[node.name].writes else ():
            before, after = measures[target.name], measures[node.name]
            same = before.storages == after.storages and before.tensors == after.tensors
            if target.name in after.writes and before.is_tensor and after.is_tensor and same:
                for user in list(target.users):
                    if node < user:
                        user.replace_input_with(target, node)
    return graph


def measure_on_fakes(program: Program) -> Mapping[str, Measure]:
    """Measure by fake tensors, without memory and arithmetic."""

    def run(number: int | None) -> Meter:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with preserved(program.model, outside_of(program)), quiet_loggers("torch._subclasses.fake_tensor"), mode:
            seed(number or 0)
            return run_measured(program, mode.from_tensor)

    return fullest(run, 0)


def measure_for_real(program: Program) -> Mapping[str, Measure]:
    """Measure by a run on copies of the example inputs; the model and the random state are restored.

    The random state is the recording's, so that what depends on drawn numbers, such as which experts run, is the same.
    """

    def run(number: int | None) -> Meter:
        args, kwargs = copied_arguments(program.args, program.kwargs)
        with preserved(program.model, outside_of(program)) as kept, kept.watching():
            if number is not None:
                seed(number)
            return run_measured(replace(program, args=args, kwargs=kwargs), lambda tensor: tensor)

    return fullest(run, None if program.capture is None else program.capture.seed)


def fullest(run: Callable[[int | None], "Meter"], number: int | None) -> Mapping[str, Measure]:
    """Measure under a seed; where modules kept whole draw, and may leave themselves out, under several others instead.

    So what a module costs and writes is not luck, and a number of cuts gives the same cuts in every process. The run that
    computes most is taken, with the writes of all. A seed under which the graph does not run is left out: it was captured
    under other draws.

    Args:
        run: Measures under a seed; under None, in the present random state.
        number: The capture's seed.
    """
    first = run(number)
    meters = []
    for each in range(MOST_OUTCOMES) if first.drew else ():
        with suppress(CaptureError, *NEEDS_VALUES):
            meters.append(run(each))
    meters = meters or [first]
    best = max(meters, key=lambda meter: sum(measure.flops for measure in meter.measures.values()))
    return {
        name: replace(
            measure, writes=tuple(dict.fromkeys(each for one in meters for each in one.measures[name].writes))
        )
        for name, measure in best.measures.items()
    }


def outside_of(program: Program) -> tuple[Any, ...]:
    """Return the variables outside of the model that its functions name."""
    return () if program.signature is None else program.signature.outside


def run_measured(program: Program, convert: Any) -> "Meter":
    """Interpret the graph on converted inputs; an error names the node."""
    if program.signature is None:
        raise CaptureError("the program has no signature yet; run capture first")
    inputs = program.signature.flatten(program.args, program.kwargs)
    meter = Meter(program, convert)
    try:
        with torch.enable_grad():
            meter.measure_all(*(convert(value) if isinstance(value, Tensor) else value for value in inputs))
    except NEEDS_VALUES:
        raise
    except Exception as error:
        place = "" if meter.current is None else f"node {described(meter.current)}: "
        raise CaptureError(
            f"the captured graph of {type(program.model).__name__} does not run on the example inputs: {place}"
            f"{as_sentence(error)}. Keep the module of that node whole: cut outside of it"
        ) from error
    return meter


class Meter(fx.Interpreter):
    """Interprets a graph and measures each node."""

    def __init__(self, program: Program, convert: Any) -> None:
        super().__init__(program.model, garbage_collect_values=False, graph=captured(program))
        self.program = program
        self.convert = convert
        self.measures: dict[str, Measure] = {}
        self.current: fx.Node | None = None
        self.counter = OperationCounter()
        self.converted: dict[int, Tensor] = {}
        self.drew = False
        self.kept = {kept.path for kept in program.capture.kept} if program.capture is not None else set()

    def measure_all(self, *inputs: Any) -> None:
        """Run the graph under the counters, on converted parameters and buffers."""
        for module in self.module.modules():
            registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for registry in registries if not isinstance(module, torch.jit.ScriptModule) else ():
                registry.update({name: self.fake(value) for name, value in registry.items() if value is not None})
        with self.counter:
            self.run(*inputs)

    def fake(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of the model once."""
        if id(tensor) not in self.converted:
            self.converted[id(tensor)] = self.convert(tensor)
        return self.converted[id(tensor)]

    def fetch_attr(self, target: str) -> Any:
        """Read a parameter, buffer or constant."""
        constants = self.program.constants
        value = constants[target] if target in constants else super().fetch_attr(target)
        return self.fake(value) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and measure what it made, wrote and cost."""
        self.current = n
        if n.target in (guard, guard_length):  # what is drawn here may be another outcome than that of the capture
            self.measures[n.name] = Measure()
            return None
        before = versions(n, self.env)
        flops, draws, of_python = self.counter.flops, self.counter.draws, python_draws()
        value = super().run_node(n)
        after = versions(n, self.env)
        if n.op != "output":
            writes = tuple(name for name, version in before.items() if after[name] != version)
            measured = self.measure(n, value, self.counter.flops - flops, writes)
            if n.op == "call_module" and n.target in self.kept:
                self.drew |= self.counter.draws > draws or of_python != python_draws()
                if trains(self.program, n):
                    measured = replace(measured, tensors=tuple(map(with_gradient, measured.tensors)))
            self.measures[n.name] = replace(measured, random=self.counter.draws > draws or n.target is call_anew)
        return value

    def measure(self, node: fx.Node, value: Any, flops: int, writes: tuple[str, ...]) -> Measure:
        """Describe a node's value."""
        tensors = held_tensors(value)
        specs, storages = tuple(map(spec_of, tensors)), tuple(map(storage_of, tensors))
        known = {storage for argument in node.all_input_nodes for storage in self.measures[argument.name].storages}
        made = [spec.bytes for spec, storage in zip(specs, storages, strict=True) if storage not in known]
        read = node_parameters(self.program, node).values()
        return Measure(
            tensors=specs,
            is_tensor=isinstance(value, Tensor),
            flops=flops,
            parameter_bytes=sum(parameter.nbytes for parameter in read),
            activation_bytes=0 if node.op in ("placeholder", "get_attr") else sum(made),
            storages=storages,
            writes=writes,
            holder=holder_of(value) if tensors else None,
        )


def holder_of(value: Any) -> Holder | None:
    """Return how a value holds its parts; None for a tensor and for a value without tensors."""
    if isinstance(value, Tensor) or not held_tensors(value):
        return None
    if type(value) in (tuple, list):
        return Holder(type(value), tuple((index, holder_of(part)) for index, part in enumerate(value)))
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return Holder(dict, tuple((key, holder_of(part)) for key, part in value.items()))
    return Holder(type(value))


def held_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a value: itself, or those in a structure or an object of any class."""
    return [tensor for _, tensor in tensors_in(value)]


def versions(node: fx.Node, env: Mapping[fx.Node, Any]) -> dict[str, tuple[int, ...]]:
    """Return the in-place version of each tensor among a node's arguments."""
    return {
        argument.name: tuple(tensor._version for tensor in held_tensors(env[argument]))
        for argument in node.all_input_nodes
    }


def trains(program: Program, node: fx.Node) -> bool:
    """Whether a node reads parameters that are trained."""
    return any(parameter.requires_grad for parameter in node_parameters(program, node).values())


def with_gradient(spec: TensorSpec) -> TensorSpec:
    """Return a spec with a gradient if its dtype can have one: a module kept whole may give one in one call and not in the next."""
    return replace(spec, requires_grad=spec.dtype.is_floating_point or spec.dtype.is_complex)


def spec_of(tensor: Tensor) -> TensorSpec:
    """Describe a tensor; of a nested one, whose rows differ in length, the shape is that of all its values in one row."""
    if tensor.is_nested:
        parts = [tensor.values()] if tensor.layout is torch.jagged else dense_parts(tensor)
        flat = (sum(part.numel() for part in parts),)
        return TensorSpec(flat, tensor.dtype, tensor.requires_grad, tensor.device, torch.jagged)
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.requires_grad, tensor.device, tensor.layout)


def node_parameters(program: Program, node: fx.Node) -> dict[str, nn.Parameter]:
    """Return the parameters that a node reads, by their path."""
    if node.op == "call_module":
        module = program.model.get_submodule(str(node.target))
        return {f"{node.target}.{name}": parameter for name, parameter in module.named_parameters()}
    if node.op == "get_attr" and node.target not in program.constants:
        path, _, name = str(node.target).rpartition(".")
        value = getattr(program.model.get_submodule(path), name)
        if isinstance(value, nn.Module):
            return {f"{node.target}.{name}": parameter for name, parameter in value.named_parameters()}
        return {str(node.target): value} if isinstance(value, nn.Parameter) else {}
    return {}


def written_memory(program: Program) -> set[int]:
    """Return the memory that some node writes to in place."""
    return {s for node in computing(captured(program)) for s in memory_written(program, node)}


def made_of_parameters(program: Program, written: AbstractSet[int]) -> set[fx.Node]:
    """Return the nodes that can run anywhere in a step: made of parameters, buffers and sizes that no node writes to."""
    measures = program.measures
    found: set[fx.Node] = set()
    for node in captured(program).nodes:
        if node.op in ("placeholder", "output") or written & set(measures[node.name].storages):
            continue
        given = [source for source in node.all_input_nodes if measures[source.name].tensors]
        if node.op == "get_attr" or (given and all(source in found for source in given) and is_pure(program, node)):
            found.add(node)
    return found


def has_gradient(program: Program, node: fx.Node) -> bool:
    """Whether a node computes a value with a gradient."""
    return node.op.startswith("call") and program.measures[node.name].requires_grad


def differentiable(program: Program) -> set[fx.Node]:
    """Return the nodes from which a differentiable path leads to the output; only these receive a gradient."""
    found: set[fx.Node] = set()
    for node in reversed(captured(program).nodes):
        if has_gradient(program, node) and any(user.op == "output" or user in found for user in node.users):
            found.add(node)
    return found


def batch_input(program: Program) -> str | None:
    """Return the name of the first input with a batch dimension; its first size is the number of examples."""
    measures = ((name, program.measures[name]) for name in input_names(program))
    return next((name for name, measure in measures if measure.is_tensor and measure.tensors[0].shape), None)


def examples_of(program: Program) -> tuple[str, int] | None:
    """Return the input, and its dimension, whose size is the number of examples: a carried state, else the first input."""
    if program.carries:
        return program.carries[0].input, program.carries[0].dim
    name = batch_input(program)
    return None if name is None else (name, program.batch_dim)


def data_inputs(program: Program) -> tuple[str, ...]:
    """Return the names of the inputs that input models see: the floating-point tensors."""
    return tuple(
        name
        for name in input_names(program)
        if all(tensor.dtype.is_floating_point for tensor in program.measures[name].tensors)
    )
