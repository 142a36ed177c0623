"""What reports say about a program, for the terminal, for pictures and for machines."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from torch import fx, nn

from dnifx.ir import Boundary, Capture, Partition, Program, TensorSpec, count_parameters, module_path
from dnifx.schedules import sequential_period

FORMAT = 2
"""Version of the machine-readable form. It grows when a key is removed or changes its meaning."""


@dataclass(frozen=True)
class ValueFacts:
    """A value: its name, the shape and dtype of each of its tensors, the bytes of all of them, and a short form."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    bytes: int
    text: str

    def __str__(self) -> str:
        return f"{self.name} {self.text}"


@dataclass(frozen=True)
class PartitionFacts:
    """A partition: where it begins and ends in the model, and what it costs.

    ``first`` and ``last`` are module paths, or node names of operations outside of submodules. ``share`` is its part of
    the program's cost, between 0 and 1. ``every`` is the number of windows from one of its firings to the next.
    """

    name: str
    index: int
    first: str
    last: str
    modules: tuple[str, ...]
    nodes: int
    parameters: int
    parameter_bytes: int
    flops: int
    activation_bytes: int
    share: float
    device: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    every: int


@dataclass(frozen=True)
class BoundaryFacts:
    """A boundary and what stands on it; the estimator's fields are None where no interface was inserted yet.

    ``estimator_flops`` are those of one answer for the example inputs, None where they are not known. ``reason`` says what was made
    of the choice of an estimator, and why.
    ``messages`` counts the firings of the producer that the consumers take at once; ``scale`` is what their synthetic
    gradients are multiplied by.
    """

    name: str
    index: int
    producer: str
    consumers: tuple[str, ...]
    values: tuple[ValueFacts, ...]
    estimator: str | None
    estimator_parameters: int | None
    estimator_flops: int | None
    reason: str | None
    locked: bool | None
    fits: bool | None
    input_model: str | None
    input_model_parameters: int | None
    messages: int
    scale: float


@dataclass(frozen=True)
class CrossingFacts:
    """A value that crosses between partitions without a gradient, and so without an interface."""

    value: ValueFacts
    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class CaptureFacts:
    """How the graph was captured: ``kept`` holds pairs of path and reason, ``tried`` pairs of method and reason."""

    method: str
    verified: bool
    kept: tuple[tuple[str, str], ...]
    tried: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ProgramFacts:
    """Everything that reports say about a program."""

    format: int
    model: str
    inputs: tuple[ValueFacts, ...]
    nodes: int
    parameters: int
    flops: int
    capture: CaptureFacts | None
    partitions: tuple[PartitionFacts, ...]
    boundaries: tuple[BoundaryFacts, ...]
    without_gradient: tuple[CrossingFacts, ...]
    context: str | None
    schedule_name: str | None
    schedule: str | None
    notes: tuple[str, ...]


def program_facts(program: Program) -> ProgramFacts:
    """Collect the facts of a program, however many passes have run on it."""
    nodes = {node.name: node for node in program.graph.nodes} if program.graph else {}
    parameters = dict(program.model.named_parameters(remove_duplicate=False))
    planned = sequential_period(program) if program.parts else program.schedule
    return ProgramFacts(
        format=FORMAT,
        model=type(program.model).__name__,
        inputs=tuple(value_facts(program, node.name) for node in nodes.values() if node.op == "placeholder"),
        nodes=len(nodes),
        parameters=count_parameters(program.model),
        flops=sum(measure.flops for measure in program.measures.values()),
        capture=_capture_facts(program.capture) if program.capture else None,
        partitions=tuple(_partition_facts(program, partition, nodes, parameters) for partition in program.partitions),
        boundaries=tuple(_boundary_facts(program, boundary) for boundary in program.boundaries),
        without_gradient=crossings_without_gradient(program),
        context=_context_facts(program),
        schedule_name=planned.name if planned else None,
        schedule=str(planned) if planned else None,
        notes=program.notes,
    )


def as_dict(program: Program) -> dict[str, Any]:
    """Return the facts as dicts, lists, strings and numbers, ready for ``json.dumps``.

    The keys are those of ``ProgramFacts``; ``format`` is the version of the form.
    """
    return _plain(asdict(program_facts(program)))  # type: ignore[no-any-return]


def operations(partition: Partition, nodes: Mapping[str, fx.Node]) -> list[fx.Node]:
    """Return a partition's nodes that compute something: no inputs, parameters or outputs."""
    own = [nodes[name] for name in partition.nodes if name in nodes]
    return [node for node in own if node.op not in ("placeholder", "get_attr", "output")]


def common_path(paths: Iterable[str]) -> str:
    """Return the path of the innermost module that holds all the given ones, or ""."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def value_facts(program: Program, name: str) -> ValueFacts:
    """Describe the value of one node; without a measure, only its name is known."""
    measure = program.measures.get(name)
    return _tensor_facts(name, measure.tensors, "no tensor") if measure else _tensor_facts(name, (), "?")


def _tensor_facts(name: str, tensors: Sequence[TensorSpec], without: str = "") -> ValueFacts:
    """Describe a value by its tensors; ``without`` is the text if there are none."""
    return ValueFacts(
        name=name,
        shapes=tuple(tensor.shape for tensor in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        bytes=sum(tensor.bytes for tensor in tensors),
        text=", ".join(map(str, tensors)) or without,
    )


def crossings_without_gradient(program: Program) -> tuple[CrossingFacts, ...]:
    """Find the values that cross from one partition to others outside of all boundaries, except the model's inputs."""
    bounded = {(value, consumer) for line in program.boundaries for value in line.values for consumer in line.consumers}
    given = {node.name for node in program.graph.nodes if node.op == "placeholder"} if program.graph else set()
    makers = {name: partition for partition in program.partitions for name in partition.outputs}
    states = {name for each in program.recurrences for name in each.values}
    found: dict[str, list[str]] = {}
    for partition in program.partitions:
        for value in partition.inputs:
            if value in states and partition is program.partitions[-1]:
                continue
            if value in makers and value not in given and (value, partition.index) not in bounded:
                found.setdefault(value, []).append(partition.name)
    return tuple(
        CrossingFacts(value_facts(program, value), makers[value].name, tuple(takers)) for value, takers in found.items()
    )


def _context_facts(program: Program) -> str | None:
    """Tell what estimators see beside the values; with several rates the target of the part that sends."""
    if program.context is None:
        return None
    return program.context.description + (" of the part that sends" if program.messages else "")


def _capture_facts(capture: Capture) -> CaptureFacts:
    """Describe how the graph was captured."""
    kept = tuple((kept.path, kept.reason) for kept in capture.kept)
    return CaptureFacts(capture.method, capture.verified, kept, capture.tried)


def _partition_facts(
    program: Program, partition: Partition, nodes: Mapping[str, fx.Node], parameters: Mapping[str, nn.Parameter]
) -> PartitionFacts:
    """Describe one partition."""
    working = operations(partition, nodes)
    places = [module_path(node) or node.name for node in working]
    return PartitionFacts(
        name=partition.name,
        index=partition.index,
        first=places[0] if places else "",
        last=places[-1] if places else "",
        modules=tuple(dict.fromkeys(path for path in map(module_path, working) if path)),
        nodes=len(partition.nodes),
        parameters=sum(parameters[path].numel() for path in partition.parameters if path in parameters),
        parameter_bytes=partition.parameter_bytes,
        flops=partition.flops,
        activation_bytes=partition.activation_bytes,
        share=_share(program, partition),
        device=str(partition.device),
        inputs=partition.inputs,
        outputs=partition.outputs,
        every=partition.every,
    )


def _share(program: Program, partition: Partition) -> float:
    """Return the partition's part of the program's cost: the measured cost or, without measures, the FLOPs."""
    if program.measures:
        cost = sum(program.measures[name].cost for name in partition.nodes if name in program.measures)
        whole = sum(measure.cost for measure in program.measures.values())
    else:
        cost, whole = partition.flops, sum(other.flops for other in program.partitions)
    return cost / whole if whole else 0.0


def _boundary_facts(program: Program, boundary: Boundary) -> BoundaryFacts:
    """Describe one boundary and its interface, if there is one."""
    interface = next((item for item in program.interfaces if item.boundary == boundary.index), None)
    model = interface.input_model if interface else None
    return BoundaryFacts(
        name=boundary.name,
        index=boundary.index,
        producer=program.partitions[boundary.producer].name,
        consumers=tuple(program.partitions[index].name for index in boundary.consumers),
        values=tuple(_tensor_facts(name, (spec,)) for name, spec in zip(boundary.values, boundary.specs, strict=True)),
        estimator=interface.description if interface else None,
        estimator_parameters=count_parameters(interface.estimator) if interface else None,
        estimator_flops=interface.flops if interface else None,
        reason=(interface.detail or None) if interface else None,
        locked=interface.locked if interface else None,
        fits=interface.fits if interface else None,
        input_model=type(model).__name__ if model else None,
        input_model_parameters=count_parameters(model) if model else None,
        messages=boundary.messages,
        scale=next((each.scale for each in program.messages if each.boundary.index == boundary.index), 1.0),
    )


def _plain(value: Any) -> Any:
    """Turn tuples into lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
