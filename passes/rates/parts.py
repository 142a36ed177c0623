"""Parts: a system of several rates taken apart, one program for each rate.

A part that fires once in k windows is captured from k windows laid end to end, so that it holds for k messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dnifx.errors import CutError, EstimatorError, PassError
from dnifx.ir import Boundary, Context, Cut, Program, TensorSpec, identifier
from dnifx.passes.graph import captured, flat_output
from dnifx.passes.insert.interfaces import Choice, make_interface
from dnifx.passes.legalize.legalize import cut_name
from dnifx.passes.rates.rated import BATCH, RatedProgram
from dnifx.passes.time.recurrences import state_positions
from dnifx.runtime.module.parts import STATES, Message, Part, PartPlan, PartSignature, StatePlan, System, Take
from dnifx.runtime.module.states import bound_arguments, follow
from dnifx.schedules.dependencies import links
from dnifx.schedules.orders import trained


def plan_of(rated: RatedProgram, windows: int) -> PartPlan:
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
    return PartPlan(
        rated.windows.index(windows),
        windows,
        tuple(takes),
        carried,
        results,
        len(rated.gives(windows)),
        tuple(rated.partitions_at(windows)),
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


def state_plan(program: Program, cut: int) -> StatePlan:
    """Describe a state that a part carries."""
    bound = bound_arguments(program.model, program.args, program.kwargs).arguments
    leaves, spec = pytree.tree_flatten(follow(bound, program.recurrents[cut].state))
    return StatePlan(identifier(program.recurrents[cut].state), cut, spec, len(leaves))


def part_program(rated: RatedProgram, windows: int) -> tuple[PartPlan, Program]:
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
        Part(whole.model, graph, signature, whole.constants),
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


def part_graph(rated: RatedProgram, plan: PartPlan) -> fx.Graph:
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


def example_values(whole: Program, plan: PartPlan) -> tuple[Tensor, ...]:
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


def example_states(whole: Program, plan: PartPlan) -> dict[str, Any]:
    """Return examples of a part's states, by key."""
    bound = bound_arguments(whole.model, whole.args, whole.kwargs).arguments
    return {state.key: follow(bound, whole.recurrents[state.cut].state) for state in plan.states}


def inner_cuts(rated: RatedProgram, plan: PartPlan) -> tuple[Cut, ...]:
    """Return the cuts inside a part: those that one of its values crosses on its way to another of its partitions."""
    partition_of, own = rated.program.partition_of, set(plan.partitions)
    inside = {
        node.name
        for node in rated.nodes_at(plan.every)
        if any(partition_of.get(user.name) in own - {partition_of[node.name]} for user in node.users)
    }
    ends = [(cut, {*cut.nodes, *(edge.source for edge in cut.edges)}) for cut in rated.program.cuts]
    return tuple(cut for cut, names in ends if names & inside) or (Cut(f"every {plan.every}"),)


@dataclass(frozen=True)
class Crossing:
    """What one partition gives to a slower part, before an interface stands there.

    Attributes:
        name: The name of its cut.
        source: Index of the part that gives.
        target: Index of the part that takes.
        producer: The partition that makes the values.
        consumers: The partitions that take them.
        values: Names of the values, in the part that gives.
        specs: Their specs there.
        places: Their places among what that part gives.
        inputs: Their places among what the other part takes.
        messages: How many firings of the one the other takes at once.
    """

    name: str
    source: int
    target: int
    producer: int
    consumers: tuple[int, ...]
    values: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    places: tuple[int, ...]
    inputs: tuple[int, ...]
    messages: int


def crossings(rated: Mapping[int, RatedProgram], parts: Sequence[tuple[PartPlan, Program]]) -> list[Crossing]:
    """Return what crosses from each part to each slower one, by the partition that makes it.

    Args:
        rated: By rate, the system captured from as many windows.
        parts: The parts, their partitions and boundaries formed.

    Raises:
        CutError: A value is not one message a window.
    """
    found: list[Crossing] = []
    for fast, _ in parts:
        for slow, program in parts[fast.index + 1 :]:
            here, there = (rated[each].crossing(fast.every, slow.every) for each in (fast.every, slow.every))
            specs = agreeing(rated, fast, slow, here, there)
            groups: dict[int, list[int]] = {}
            for number, (node, spec) in enumerate(zip(here, specs, strict=True)):
                if spec.requires_grad:
                    groups.setdefault(rated[fast.every].program.partition_of[node.name], []).append(number)
            for producer, numbers in groups.items():
                taken = {there[number].name for number in numbers}
                given = rated[fast.every].gives(fast.every)
                names = [take.name for take in slow.takes]
                found.append(
                    Crossing(
                        cut_name(rated[fast.every].program, here[numbers[0]]),
                        fast.index,
                        slow.index,
                        producer,
                        tuple(slow.partitions[p.index] for p in program.partitions if taken & set(p.inputs)),
                        tuple(here[number].name for number in numbers),
                        tuple(specs[number] for number in numbers),
                        tuple(given.index(here[number]) for number in numbers),
                        tuple(names.index(there[number].name) for number in numbers),
                        slow.every // fast.every,
                    )
                )
    return found


def agreeing(
    rated: Mapping[int, RatedProgram], fast: PartPlan, slow: PartPlan, here: list[fx.Node], there: list[fx.Node]
) -> list[TensorSpec]:
    """Return the specs of what one firing of the fast part gives, after making sure that the slow part takes k of each.

    Raises:
        CutError: It does not.
    """
    few = [rated[fast.every].program.measures[node.name].tensors[0] for node in here]
    for node, spec in zip(here, few, strict=True):
        if spec.requires_grad and len(spec.shape) <= BATCH + 1:
            raise CutError(
                f"{node.name!r} crosses to the part that fires every {slow.every} windows, and is {spec}; a message is [windows, batch, "
                "features, ...]: let inputs and messages lead with time, a single step being one window"
            )
    many = [rated[slow.every].program.measures[node.name].tensors[0] for node in there]
    count = slow.every // fast.every
    wanted = [(count * spec.shape[0], *spec.shape[1:]) if len(spec.shape) > BATCH else None for spec in few]
    if wanted != [spec.shape for spec in many]:
        shown = [", ".join(map(str, specs)) for specs in (few, many)]
        raise CutError(
            f"what crosses to the part that fires every {slow.every} windows is {shown[0]} in {fast.every} of them and {shown[1]} in "
            f"{slow.every}; expected {count} times as many messages: let inputs and messages lead with time ([windows, batch, ...]), so "
            "that windows can be laid end to end"
        )
    return few


def message(
    crossing: Crossing, index: int, name: str, choice: Choice, scale: float, program: Program, context: Context | None
) -> Message:
    """Put an interface on what crosses between two parts.

    Args:
        crossing: What crosses.
        index: Its number among all boundaries.
        name: Its name, another than that of every other boundary.
        choice: The estimator.
        scale: What synthetic gradients are multiplied by.
        program: The part that gives.
        context: What the estimator sees beside the messages.

    Raises:
        EstimatorError: The estimator waits for the target, or needs what no message brings.
    """
    specs = tuple(replace(each, shape=(each.shape[0] * each.shape[1], *each.shape[2:])) for each in crossing.specs)
    boundary = Boundary(index, name, crossing.producer, crossing.consumers, crossing.values, specs, crossing.messages)
    interface = make_interface(boundary, choice, context, program, specs[0].shape[0])
    if interface.locked or interface.blends or interface.needs_end:
        raise EstimatorError(
            f"boundary {name!r} carries messages to a part that fires once for {crossing.messages} of them, and {interface.description} "
            "waits for the gradient or the loss, which come only then: give an estimator that answers at once, as "
            "dnifx.estimators.Synthetic()"
        )
    return Message(boundary, interface, crossing.source, crossing.target, crossing.places, crossing.inputs, scale)


def system_of(
    whole: Program,
    plans: Sequence[PartPlan],
    programs: Sequence[Program],
    messages: Sequence[Message],
    context: Context | None,
) -> System:
    """Join parts and messages, with one numbering of all partitions and boundaries for the schedules.

    Raises:
        CutError: Two parts train the same parameter.
    """
    refuse_shared(programs)
    refuse_silent(plans, programs, messages)
    partitions = []
    for plan, program in zip(plans, programs, strict=True):
        for part in program.partitions:
            own = f"part {plan.index}: "
            named = [tuple(own + name for name in names) for names in (part.inputs, part.outputs)]
            number = plan.partitions[part.index]
            partitions.append(replace(part, index=number, inputs=named[0], outputs=named[1], every=plan.every))
    boundaries: list[Boundary] = []
    interfaces, places = [], []
    for plan, program in zip(plans, programs, strict=True):
        places.append(tuple(range(len(boundaries), len(boundaries) + len(program.boundaries))))
        for each, interface in zip(program.boundaries, program.interfaces, strict=True):
            number = len(boundaries)
            users = tuple(plan.partitions[index] for index in each.consumers)
            boundaries.append(replace(each, index=number, producer=plan.partitions[each.producer], consumers=users))
            interfaces.append(replace(interface, boundary=number))
    schedule = Program(
        whole.model,
        partitions=tuple(sorted(partitions, key=lambda part: part.index)),
        boundaries=(*boundaries, *(each.boundary for each in messages)),
        interfaces=(*interfaces, *(each.interface for each in messages)),
        context=context,
    )
    if whole.signature is None:
        raise PassError("the system has no signature; run capture first")
    outputs = len(flat_output(captured(whole)))
    return System(
        whole, whole.signature, outputs, tuple(plans), tuple(programs), tuple(messages), schedule, tuple(places)
    )


def refuse_shared(programs: Sequence[Program]) -> None:
    """Raise CutError where parts that fire at different rates read the same trainable parameter."""
    owners: dict[str, int] = {}
    for index, program in enumerate(programs):
        for name in (name for part in program.partitions for name in part.uses):
            if owners.setdefault(name, index) != index:
                raise CutError(
                    f"{name!r} is trained by two parts that fire at different rates; give each part parameters of its own, or freeze it"
                )


def refuse_silent(plans: Sequence[PartPlan], programs: Sequence[Program], messages: Sequence[Message]) -> None:
    """Raise CutError where a part takes messages and trains nothing, so that it runs no backward pass to answer them."""
    for each in messages:
        plan, program = plans[each.target], programs[each.target]
        backward = {plan.partitions[index] for index in trained(links(program))}
        for index in set(each.boundary.consumers) - backward:
            raise CutError(
                f"submod_{index} takes the messages {each.boundary.name!r} and reads no trainable parameter, so that no gradient of theirs "
                "would come back; unfreeze it, or cut elsewhere"
            )
