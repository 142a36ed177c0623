"""A system of several rates as people and machines read it: its parts, the messages between them, its period."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dnifx import schedules
from dnifx.ir import Boundary, Program
from dnifx.report.facts import FORMAT, ProgramFacts, count_parameters, plain, program_facts
from dnifx.report.terminal import plain_text, shown
from dnifx.report.units import plural
from dnifx.runtime.module.parts import Message, PartPlan, System

WIDTH = 100
"""Characters of a line of the plain text."""


@dataclass(frozen=True)
class PartFacts:
    """A part: how often it fires, and its program, whose partitions bear the system's names; costs are of one firing."""

    every: int
    partitions: tuple[str, ...]
    program: ProgramFacts


@dataclass(frozen=True)
class MessageFacts:
    """What one part gives to a slower one: ``messages`` of them at once, and what answers for their gradients."""

    name: str
    producer: str
    consumers: tuple[str, ...]
    values: tuple[str, ...]
    messages: int
    estimator: str
    estimator_parameters: int
    scale: float


@dataclass(frozen=True)
class SystemFacts:
    """Everything that reports tell of a system; ``period`` is the sequential one."""

    format: int
    model: str
    parameters: int
    parts: tuple[PartFacts, ...]
    messages: tuple[MessageFacts, ...]
    context: str | None
    period: str


@dataclass(frozen=True)
class SystemReport:
    """A system for rich, and as plain text: each part as a program, then messages and the sequential period."""

    system: System

    def __str__(self) -> str:
        return plain_text(self, WIDTH)

    def __rich__(self) -> RenderableType:
        facts = system_facts(self.system)
        rates = "fire at different rates" if len(facts.parts) > 1 else "fires at every window"
        sizes = f"{plural(len(facts.parts), 'part')}, which {rates} · {plural(facts.parameters, 'parameter')}"
        lines: list[RenderableType] = [Text.assemble((facts.model, "bold"), "  ", sizes)]
        for part in facts.parts:
            lines += ["", shown(replace(part.program, model=often(part.every)))]
        if facts.messages:
            lines += ["", Text("messages", "bold"), *(Text(f"  {message_line(each)}") for each in facts.messages)]
        if facts.context:
            lines.append(Text(f"  their estimators see: {facts.context}, of the part that sends"))
        period = schedules.sequential_period(self.system.schedule)
        return Group(*lines, "", schedules.grid(period, self.system.schedule))


def often(every: int) -> str:
    """Say how often a part fires."""
    return "every window" if every == 1 else f"every {every} windows"


def message_line(each: MessageFacts) -> str:
    """Say what crosses between two parts, and what answers for its gradient."""
    return (
        f"{each.name}: {', '.join(each.values)}, {each.producer} -> {', '.join(each.consumers)}, {each.messages} at once; "
        f"{each.estimator}, {plural(each.estimator_parameters, 'parameter')}, scale {each.scale:g}"
    )


def system_facts(system: System) -> SystemFacts:
    """Collect the facts of a system."""
    parts = zip(system.plans, system.programs, strict=True)
    return SystemFacts(
        format=FORMAT,
        model=type(system.whole.model).__name__,
        parameters=count_parameters(system.whole.model),
        parts=tuple(part_facts(plan, program, system) for plan, program in parts),
        messages=tuple(message_facts(each) for each in system.messages),
        context=system.schedule.context.description if system.schedule.context else None,
        period=str(schedules.sequential_period(system.schedule)),
    )


def system_dict(system: System) -> dict[str, Any]:
    """Return the facts as plain dicts, lists, strings and numbers, ready for ``json.dumps``; keys are those of SystemFacts."""
    return plain(system_facts(system))


def part_facts(plan: PartPlan, program: Program, system: System) -> PartFacts:
    """Describe one part by the system's names; a schedule of its own it has none."""
    facts = program_facts(program)
    names = {part.name: f"submod_{plan.partitions[part.index]}" for part in facts.partitions}
    partitions = tuple(
        replace(part, name=names[part.name], index=plan.partitions[part.index], every=plan.every)
        for part in facts.partitions
    )
    numbers = system.places[plan.index]
    boundaries = tuple(
        replace(each, index=number, producer=names[each.producer], consumers=renamed(each.consumers, names))
        for number, each in zip(numbers, facts.boundaries, strict=True)
    )
    without = tuple(
        replace(each, producer=names[each.producer], consumers=renamed(each.consumers, names))
        for each in facts.without_gradient
    )
    notes = tuple(re.sub(r"\bsubmod_\d+\b", lambda found: names[found[0]], note) for note in facts.notes)
    program_of_part = replace(
        facts,
        model=type(system.whole.model).__name__,
        parameters=sum(part.parameters for part in partitions),
        partitions=partitions,
        boundaries=boundaries,
        without_gradient=without,
        schedule_name=None,
        schedule=None,
        notes=notes,
    )
    return PartFacts(plan.every, tuple(part.name for part in partitions), program_of_part)


def renamed(names: Sequence[str], known: dict[str, str]) -> tuple[str, ...]:
    """Return the system's names of a part's partitions."""
    return tuple(known[name] for name in names)


def message_facts(each: Message) -> MessageFacts:
    """Describe what crosses between two parts."""
    return MessageFacts(
        name=each.boundary.name,
        producer=f"submod_{each.boundary.producer}",
        consumers=tuple(f"submod_{index}" for index in each.boundary.consumers),
        values=tuple(map(str, each.boundary.specs)),
        messages=each.boundary.messages,
        estimator=each.interface.description,
        estimator_parameters=count_parameters(each.interface.estimator),
        scale=each.scale,
    )


def drawable(system: System) -> Program:
    """Return the system's program of one window with its rates and all its boundaries, for pictures."""
    every = {part.index: part.every for part in system.schedule.partitions}
    return replace(
        system.whole,
        partitions=tuple(replace(part, every=every.get(part.index, 1)) for part in system.whole.partitions),
        boundaries=tuple(crossing(each, system.whole) for each in system.schedule.boundaries),
        interfaces=system.schedule.interfaces,
    )


def crossing(each: Boundary, whole: Program) -> Boundary:
    """Return a boundary with the values that cross there in the program of one window; a slow part's own are of several."""
    nodes = whole.graph.nodes if whole.graph is not None else ()
    values = tuple(
        node.name
        for node in nodes
        if whole.partition_of.get(node.name) == each.producer
        and whole.measures[node.name].requires_grad
        and any(user.op != "output" and whole.partition_of[user.name] in each.consumers for user in node.users)
    )
    return replace(each, values=values, specs=tuple(whole.measures[name].tensors[0] for name in values))
