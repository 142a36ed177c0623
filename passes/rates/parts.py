"""Parts: a system of several rates taken apart, one program for each rate.

A part that fires once in k windows is captured from k windows laid end to end, so that it holds for k messages.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dnifx.errors import CutError, PassError
from dnifx.ir import (
    Boundary,
    Context,
    Cut,
    Interface,
    Message,
    Part,
    Partition,
    PartState,
    Program,
    Take,
    identifier,
)
from dnifx.passes.graph import captured, flat_output
from dnifx.passes.rates.rated import BATCH, RatedProgram
from dnifx.passes.rates.refusals import refuse_shared, refuse_untaught
from dnifx.passes.time.states import state_positions
from dnifx.runtime.net.part_model import STATES, PartModel, PartSignature
from dnifx.runtime.net.states import bound_arguments, follow


def plan_of(rated: RatedProgram, windows: int) -> Part:
    """Return what a part is made of.

    Raises:
        CutError: A state is shared with a part that fires at another rate.
    """
    program, nodes = rated.program, set(rated.nodes_at(windows))
    inputs = program.signature.inputs if program.signature is not None else ()
    states = {carry.input for carry in program.carries}
    takes = []
    for node in captured(program).nodes:
        if node in nodes or not any(user in nodes for user in node.users) or node.name in states:
            continue
        home = program.partition_of.get(node.name)
        source = None if home is None else rated.windows.index(rated.rates[home].windows)
        place = inputs.index(node.name) if source is None else rated.gives(rated.windows[source]).index(node)
        takes.append(Take(node.name, source, place))
    alone = state_positions(program)
    flat = enumerate(flat_output(captured(program)))
    results = tuple(place for place, node in flat if node in nodes and place not in alone)
    carried = tuple(state_plan(program, cut) for cut in range(len(program.recurrents)) if carries(rated, cut, nodes))
    return Part(
        rated.windows.index(windows),
        windows,
        tuple(rated.partitions_at(windows)),
        takes=tuple(takes),
        states=carried,
        results=results,
        gives=len(rated.gives(windows)),
    )


def carries(rated: RatedProgram, cut: int, nodes: set[fx.Node]) -> bool:
    """Whether a part carries a state.

    Raises:
        CutError: It shares the state with another part.
    """
    names = {node.name: node for node in captured(rated.program).nodes}
    own = [carry for carry in rated.program.carries if carry.cut == cut]
    ends = [names[carry.value] for carry in own]
    ends += [user for carry in own for user in names[carry.input].users if user.op != "output"]
    inside = [end in nodes for end in ends]
    if any(inside) and not all(inside):
        raise CutError(
            f"{rated.program.recurrents[cut]!r}: the state is taken or left by parts that fire at different rates; give each part a "
            "state of its own"
        )
    return any(inside)


def state_plan(program: Program, cut: int) -> PartState:
    """Describe a state that a part carries."""
    bound = bound_arguments(program.model, program.args, program.kwargs).arguments
    leaves, spec = pytree.tree_flatten(follow(bound, program.recurrents[cut].state))
    return PartState(identifier(program.recurrents[cut].state), cut, spec, len(leaves))


def part_program(rated: RatedProgram, windows: int) -> tuple[Part, Program]:
    """Return a part's plan, and its program with a graph of its own and its nodes' partitions, ready to be measured.

    Raises:
        CutError: A state is shared with a part that fires at another rate.
    """
    whole, plan = rated.program, plan_of(rated, windows)
    graph = part_graph(rated, plan)
    nodes = {node.name for node in graph.nodes if node.op not in ("placeholder", "output")}
    order = {home: place for place, home in enumerate(plan.partitions)}
    partition_of = {name: order.get(whole.partition_of[name], 0) for name in nodes} | {"output": len(order) - 1}
    if whole.signature is None:
        raise PassError("the system has no signature; run capture first")
    example = whole.args, whole.kwargs
    inputs = tuple(node.name for node in graph.nodes if node.op == "placeholder")
    signature = PartSignature(inputs, plan, whole.signature, example)
    program = Program(
        PartModel(whole.model, graph, signature, whole.constants),
        (example_values(whole, plan), example_states(whole, plan)),
        graph=graph,
        signature=signature,
        capture=whole.capture,
        constants=whole.constants,
        cuts=inner_cuts(rated, plan),
        levels={name: whole.levels[name] for name in nodes if name in whole.levels},
        partition_of=partition_of,
        recurrents=tuple(
            replace(whole.recurrents[state.cut], state=f"{STATES}.{state.key}", next_state=f"2.{state.key}")
            for state in plan.states
        ),
        batch_dim=BATCH,
    )
    return plan, program


def part_graph(rated: RatedProgram, plan: Part) -> fx.Graph:
    """Copy a part's nodes to a graph of its own: what it takes and its states to results, what it gives, and next states."""
    program, graph = rated.program, fx.Graph()
    nodes = {node.name: node for node in captured(program).nodes}
    own = [carry for state in plan.states for carry in program.carries if carry.cut == state.cut]
    copies: dict[fx.Node, fx.Node] = {}
    for name in (*(take.name for take in plan.takes), *(carry.input for carry in own)):
        copies[nodes[name]] = graph.create_node("placeholder", name, name=name)
    for node in rated.nodes_at(plan.every):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    flat = flat_output(captured(program))
    values = [*(flat[place] for place in plan.results), *rated.gives(plan.every), *(nodes[c.value] for c in own)]
    graph.output(tuple(copies[value] for value in values)).name = "output"
    return graph


def example_values(whole: Program, plan: Part) -> tuple[Tensor, ...]:
    """Return examples of what a part takes; messages carry gradients."""
    flat = whole.signature.flatten(whole.args, whole.kwargs) if whole.signature is not None else ()

    def example(take: Take) -> Tensor:
        spec = whole.measures[take.name].tensors[0]
        value: Tensor = (
            flat[take.place]
            if take.source is None
            else torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device, requires_grad=spec.requires_grad)
        )
        return value

    return tuple(map(example, plan.takes))


def example_states(whole: Program, plan: Part) -> dict[str, Any]:
    """Return examples of a part's states, by key."""
    bound = bound_arguments(whole.model, whole.args, whole.kwargs).arguments
    return {state.key: follow(bound, whole.recurrents[state.cut].state) for state in plan.states}


def inner_cuts(rated: RatedProgram, plan: Part) -> tuple[Cut, ...]:
    """Return the cuts inside a part: those that one of its values crosses on its way to another of its partitions."""
    partition_of, own = rated.program.partition_of, set(plan.partitions)
    inside = {
        node.name
        for node in rated.nodes_at(plan.every)
        if any(partition_of.get(user.name) in own - {partition_of[node.name]} for user in node.users)
    }
    ends = [(cut, {*cut.nodes, *(edge.source for edge in cut.edges)}) for cut in rated.program.cuts]
    return tuple(cut for cut, names in ends if names & inside) or (Cut(f"every {plan.every}"),)


def joined(
    whole: Program,
    parts: Sequence[Part],
    programs: Sequence[Program],
    messages: Sequence[Message],
    message_interfaces: Sequence[Interface],
    context: Context | None,
) -> Program:
    """Join parts and messages: one numbering of all partitions and boundaries, over the graph of one window.

    What a partition costs is that of one firing. The boundaries inside parts come first, then those of messages.

    Raises:
        CutError: Two parts train the same parameter.
    """
    refuse_shared(programs)
    refuse_untaught(parts, programs, messages)
    partitions = {each.index: each for each in whole.partitions}
    boundaries: list[Boundary] = []
    interfaces: list[Interface] = []
    numbered = []
    for part, program in zip(parts, programs, strict=True):
        for own in program.partitions:
            number = part.partitions[own.index]
            there = partitions[number]
            partitions[number] = replace(
                own,
                index=number,
                nodes=there.nodes,
                inputs=inputs_of(there, whole),
                outputs=there.outputs,
                every=part.every,
            )
        first = len(boundaries)
        for each, interface in zip(program.boundaries, program.interfaces, strict=True):
            users = tuple(part.partitions[index] for index in each.consumers)
            interfaces.append(replace(interface, boundary=len(boundaries)))
            moved = replace(each, index=len(boundaries), producer=part.partitions[each.producer], consumers=users)
            boundaries.append(in_one_window(moved, whole))
        numbered.append(replace(part, boundaries=tuple(range(first, len(boundaries)))))
    return replace(
        whole,
        partitions=tuple(partitions.values()),
        boundaries=(*boundaries, *(in_one_window(each.boundary, whole) for each in messages)),
        interfaces=(*interfaces, *message_interfaces),
        context=context,
        parts=tuple(numbered),
        programs=tuple(programs),
        messages=tuple(messages),
        notes=tuple(dict.fromkeys((*whole.notes, *notes_of(parts, programs)))),
    )


def inputs_of(partition: Partition, whole: Program) -> tuple[str, ...]:
    """Return what a partition takes; each part returns its own outputs, so what is only returned is taken from nobody."""
    nodes, inside = {node.name: node for node in captured(whole).nodes}, set(partition.nodes)
    return tuple(
        name for name in partition.inputs if any(u.op != "output" and u.name in inside for u in nodes[name].users)
    )


def notes_of(parts: Sequence[Part], programs: Sequence[Program]) -> list[str]:
    """Return the notes of all parts, with the numbers that their partitions have in the net."""
    notes = []
    for part, program in zip(parts, programs, strict=True):
        names = {each.name: f"submod_{part.partitions[each.index]}" for each in program.partitions}
        notes += [re.sub(r"\bsubmod_\d+\b", lambda name, names=names: names[name[0]], note) for note in program.notes]  # type: ignore[misc]
    return notes


def in_one_window(boundary: Boundary, whole: Program) -> Boundary:
    """Return a boundary by the names that its values have in the graph of one window."""
    values = tuple(
        node.name
        for node in captured(whole).nodes
        if whole.partition_of.get(node.name) == boundary.producer
        and whole.measures[node.name].requires_grad
        and any(user.op != "output" and whole.partition_of[user.name] in boundary.consumers for user in node.users)
    )
    return replace(boundary, values=values, specs=tuple(whole.measures[name].tensors[0] for name in values))
