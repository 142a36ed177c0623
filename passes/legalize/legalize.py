"""Legalize: repair or refuse what would make a cut wrong; then form partitions and boundaries."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import fx, nn

from dnifx.errors import CutError, LegalizeError, PassError
from dnifx.ir import Boundary, Cut, Partition, Program, TensorSpec, free_name, identifier, module_path
from dnifx.passes.cuts.partition import gradient_edges, partitioned
from dnifx.passes.graph import captured, copied, described, listed
from dnifx.passes.legalize.checkpoints import settle_checkpoints
from dnifx.passes.legalize.containers import without_containers
from dnifx.passes.legalize.derivatives import refuse_cut_derivatives
from dnifx.passes.legalize.repeats import repeat_parameters
from dnifx.passes.legalize.writes import crossing_writes, shield_writes
from dnifx.passes.measure import MeasureNodes, differentiable, node_parameters
from dnifx.passes.pipeline import Pass
from dnifx.passes.time.states import only_as_state


@dataclass(frozen=True)
class Legalize(Pass):
    """Take containers apart where they cross, shield in-place writes, give each parameter one owner, form boundaries."""

    name: ClassVar[str] = "legalize"
    requires: ClassVar[tuple[str, ...]] = ("graph", "measures", "cuts", "partition_of")
    ensures: ClassVar[tuple[str, ...]] = ("partitions",)

    def run(self, program: Program) -> Program:
        """Rewrite a copy of the graph where a cut would change what it computes."""
        given = program
        program, notes = with_repeats(program)
        program = without_containers(program)
        partition_of, graph = dict(program.partition_of), captured(program)
        notes += shield_writes(graph, program, partition_of)
        legal = replace(program, graph=graph, partition_of=partition_of)
        if len(graph.nodes) != len(program.measures) + 1:
            legal = MeasureNodes().run(legal)
            refuse_remaining(legal)
        boundaries = form_boundaries(legal)
        refuse_cut_derivatives(legal, boundaries)
        partitions, owners = form_partitions(legal)
        notes += owners + cuts_without_gradient(given, legal, boundaries) + settle_checkpoints(legal)
        return replace(legal, partitions=partitions, boundaries=boundaries, notes=program.notes + tuple(notes))

    def check(self, program: Program) -> None:
        """Every node but the inputs has exactly one partition."""
        nodes = [name for partition in program.partitions for name in partition.nodes]
        if len(nodes) != len(set(nodes)) or set(nodes) != {node.name for node in partitioned(captured(program))}:
            raise PassError("a node has no partition, or two")


def with_repeats(program: Program) -> tuple[Program, list[str]]:
    """Let each partition compute what is made of parameters alone; the result's graph is always a copy."""
    partition_of = dict(program.partition_of)
    found = replace(program, graph=copied(captured(program)), partition_of=partition_of)
    notes = repeat_parameters(found, partition_of)
    return found if len(captured(found).nodes) == len(program.measures) + 1 else MeasureNodes().run(found), notes


def refuse_remaining(program: Program) -> None:
    """Raise LegalizeError where a write still reaches another partition."""
    for write in crossing_writes(captured(program), program, dict(program.partition_of)):
        raise LegalizeError(
            f"{described(write.node)} writes in place to memory that another partition reads; make the write out of place, or cut "
            "elsewhere"
        )


def form_boundaries(program: Program) -> tuple[Boundary, ...]:
    """Group the differentiable values that leave each partition by the cut that they cross."""
    groups: dict[tuple[int, str], list[fx.Node]] = {}
    live = differentiable(program)
    for node in captured(program).nodes:
        if node in live and program.measures[node.name].is_tensor and consumers_of(program, node):
            groups.setdefault((program.partition_of[node.name], cut_name(program, node)), []).append(node)
    boundaries: list[Boundary] = []
    taken: set[str] = set()
    for (producer, name), nodes in sorted(groups.items(), key=lambda item: item[0][0]):
        title = free_name(name, taken)
        taken.add(identifier(title))
        specs = tuple(program.measures[node.name].tensors[0] for node in nodes)
        refuse_layouts(title, nodes, specs)
        consumers = sorted({index for node in nodes for index in consumers_of(program, node)})
        values = tuple(node.name for node in nodes)
        boundaries.append(Boundary(len(boundaries), title, producer, tuple(consumers), values, specs))
    return tuple(boundaries)


def refuse_layouts(boundary: str, nodes: Iterable[fx.Node], specs: Iterable[TensorSpec]) -> None:
    """Raise LegalizeError where a value has no dense gradient: it is sparse or nested."""
    for node, spec in zip(nodes, specs, strict=True):
        if spec.layout is not torch.strided:
            raise LegalizeError(
                f"{described(node)} is {spec} and crosses the boundary {boundary!r} with a gradient, but synthetic gradients are for "
                "dense tensors only. Cut before it is made or behind its last use, or let its values cross as a dense tensor"
            )


def consumers_of(program: Program, node: fx.Node) -> set[int]:
    """Return the other partitions that use a node's value, beyond passing it on as a state."""
    users = [user for user in node.users if not only_as_state(program, node, user)]
    return {program.partition_of[user.name] for user in users} - {program.partition_of[node.name]}


def cut_name(program: Program, node: fx.Node) -> str:
    """Return the name of the cut that a value crosses: its own, or the first one of its partition."""
    level = program.levels.get(node.name)
    for cut in program.cuts:
        if node.name in cut_sources(cut) or cut.level == level is not None:
            return cut.name
    for cut in program.cuts:
        sources = cut_sources(cut) if cut.level is None else ()
        if any(program.partition_of[name] == program.partition_of[node.name] for name in sources):
            return cut.name
    return module_path(node) or node.name


def cut_sources(cut: Cut) -> set[str]:
    """Return the names of the nodes whose values cross a cut."""
    return {*cut.nodes, *(edge.source for edge in cut.edges)}


def form_partitions(program: Program) -> tuple[tuple[Partition, ...], list[str]]:
    """Describe each partition; a parameter used in several is owned, and updated once, by the last of them."""
    nodes: dict[int, list[fx.Node]] = {}
    for node in partitioned(captured(program)):
        nodes.setdefault(program.partition_of[node.name], []).append(node)
    names = {id(parameter): name for name, parameter in program.model.named_parameters()}
    live = differentiable(program)

    def learns(node: fx.Node) -> bool:
        read = node.op == "get_attr" and any(user in live or user.op == "output" for user in node.users)
        return node in live or read

    uses = {index: used_parameters(program, filter(learns, nodes[index]), names) for index in sorted(nodes)}
    owners = {name: index for index, used in uses.items() for name in used}
    partitions = tuple(describe(program, index, nodes[index], uses[index], owners) for index in sorted(nodes))
    return partitions, ownership_notes(program, uses, owners, names)


def used_parameters(program: Program, nodes: Iterable[fx.Node], names: Mapping[int, str]) -> tuple[str, ...]:
    """Return the paths of the trainable parameters that nodes read, each once, by its first name in the model."""
    read = chain.from_iterable(node_parameters(program, node).values() for node in nodes)
    return tuple(dict.fromkeys(names[id(each)] for each in read if each.requires_grad and id(each) in names))


def ownership_notes(
    program: Program, uses: Mapping[int, tuple[str, ...]], owners: Mapping[str, int], names: Mapping[int, str]
) -> list[str]:
    """Return notes on parameters that several partitions share, that are frozen, or that no gradient reaches."""
    users: dict[str, list[str]] = {}
    for index, used in uses.items():
        for name in used:
            users.setdefault(name, []).append(f"submod_{index}")
    notes = [
        f"{name} is used in {', '.join(users[name])}; submod_{owner} owns it and updates it once, with the gradients of all"
        for name, owner in owners.items()
        if len(users[name]) > 1
    ]
    named = dict(program.model.named_parameters())
    frozen = sum(not parameter.requires_grad for parameter in named.values())
    if frozen:
        notes.append(f"{frozen} frozen parameter{'s are' if frozen > 1 else ' is'} never updated")
    unused = [name for name, parameter in named.items() if parameter.requires_grad and name not in owners]
    if unused:
        notes.append(f"no gradient reaches {listed(unused)}: never updated")
    return notes


def describe(
    program: Program, index: int, nodes: list[fx.Node], uses: tuple[str, ...], owners: Mapping[str, int]
) -> Partition:
    """Describe one partition."""
    inside = set(nodes)
    inputs = dict.fromkeys(source.name for node in nodes for source in node.all_input_nodes if source not in inside)
    outputs = [node.name for node in nodes if any(user not in inside for user in node.users)]
    measures = [program.measures[node.name] for node in nodes if node.op != "output"]
    parameters = {id(each): each for node in nodes for each in node_parameters(program, node).values()}
    return Partition(
        index=index,
        nodes=tuple(node.name for node in nodes),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        parameters=tuple(name for name in uses if owners[name] == index),
        uses=uses,
        flops=sum(measure.flops for measure in measures),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters.values()),
        activation_bytes=sum(measure.activation_bytes for measure in measures),
        device=device_of(program, parameters.values()),
    )


def device_of(program: Program, parameters: Iterable[nn.Parameter]) -> torch.device:
    """Return the device of the first parameter, or of the example inputs."""
    devices = (parameter.device for parameter in parameters)
    elsewhere = (tensor.device for measure in program.measures.values() for tensor in measure.tensors)
    return next(chain(devices, elsewhere), torch.device("cpu"))


def cuts_without_gradient(program: Program, legal: Program, boundaries: Sequence[Boundary]) -> list[str]:
    """Return notes on the cuts that no gradient crosses: they need no interface.

    Args:
        program: The program as partitions were formed.
        legal: The program after legalize.
        boundaries: The boundaries of the legal program.

    Raises:
        CutError: A gradient crossed a cut, and what legalize moved left the cut without a boundary.
    """
    named = {boundary.name.partition("@")[0] for boundary in boundaries} | {boundary.name for boundary in boundaries}
    values = {name for boundary in boundaries for name in boundary.values}
    bare = [cut for cut in program.cuts if cut_sources(cut) and cut.name not in named and not values & cut_sources(cut)]
    for cut in bare:
        edges = [] if cut.level is not None else gradient_edges(program, cut)
        if edges and all(legal.partition_of[source.name] == legal.partition_of[user.name] for source, user in edges):
            source, user = edges[0]
            raise CutError(
                f"the cut {cut.name} cannot be made: {described(source)} and {described(user)}, which are on its two sides, have to be in "
                "one partition; cut elsewhere, or leave this cut out"
            )
    return [f"no gradient crosses the cut {cut.name}: it has no interface" for cut in bare]
