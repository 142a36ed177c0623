"""What a page plays: the actions of a schedule in time, in a row for each partition and place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dnifx.ir import Kind, Period, Program, Schedule
from dnifx.schedules import Simulation, Span, backprop, on_partition, placed, sequential_period, simulate, timed
from dnifx.schedules.language import unplaced
from dnifx.units import quantity

STEPS = 3
"""How many steps are played where partitions have devices of their own, so that steps overlap."""

SAYS = {
    Kind.FORWARD: "{} runs forward",
    Kind.INPUT: "{} gets its synthetic input",
    Kind.BACKWARD: "{} runs backward",
    Kind.UPDATE: "{} is updated",
    Kind.RENEW: "an earlier update of {} reaches the partitions that share parameters",
    Kind.SYNTHESISE: "the estimator of {} answers",
    Kind.TARGET: "the target of {} arrives",
    Kind.FIT: "the estimator of {} is fitted",
    Kind.SEND_VALUES: "{} sends its values",
    Kind.RECEIVE_VALUES: "the values of {} are received",
    Kind.SEND_TARGET: "the target of {} is sent",
    Kind.RECEIVE_TARGET: "the target of {} is received",
    Kind.SEND_GRADIENTS: "{} sends the gradients of shared parameters",
    Kind.RECEIVE_GRADIENTS: "the gradients of {} for shared parameters are received",
    Kind.SEND_WEIGHTS: "{} sends its shared parameters",
    Kind.RECEIVE_WEIGHTS: "the shared parameters of {} are received",
    Kind.SEND_COPIES: "what the estimator of {} copies is sent",
    Kind.RECEIVE_COPIES: "what the estimator of {} copies is received",
}
"""What an action does to its partition or its boundary."""


@dataclass(frozen=True)
class Act:
    """One action in time.

    Attributes:
        name: The action: ``F0``.
        says: What it does.
        row: Number of its row.
        step: Number of its training step or window.
        key: Its partition's number, or the key of its gate.
        costs: When it begins and ends by cost.
        turns: When it begins and ends if every action takes one unit.
    """

    name: str
    says: str
    row: int
    step: int
    key: int | str
    costs: tuple[float, float]
    turns: tuple[float, float]


@dataclass(frozen=True)
class Play:
    """One schedule in time.

    Attributes:
        title: What is played.
        rows: Name of each row.
        acts: The actions.
        unit: Unit of the costs.
        length: How long it takes, in words.
    """

    title: str
    rows: tuple[str, ...]
    acts: tuple[Act, ...]
    unit: str
    length: str


def plays_of(program: Program, chosen: Schedule | Period | None = None) -> tuple[Play, ...]:
    """Simulate what a page plays.

    Args:
        program: The program; where it has no interfaces, there is nothing to play.
        chosen: The schedule; by default the program's own, once on the devices that it names, and once with a device for
            each partition, beside backpropagation there.
    """
    if not program.interfaces and not program.schedule:
        return ()
    if chosen is not None:
        return (play(program, chosen, chosen.name, STEPS if isinstance(chosen, Schedule) else 1),)
    schedule = sequential_period(program) if program.parts else program.schedule
    if schedule is None:
        return ()
    apart = [f"device {partition.index}" for partition in program.partitions]
    over = STEPS if isinstance(schedule, Schedule) else 2
    found = [play(program, schedule, f"{schedule.name}, as it stands", 1)]
    if len(apart) > 1:
        several = f"{over} {'steps' if isinstance(schedule, Schedule) else 'periods'}, a device for each partition"
        found.append(play(program, placed(schedule, program, apart), f"{schedule.name}: {several}", over))
        if not program.parts:
            locked = placed(backprop(program), program, apart)
            found.append(play(program, locked, f"{locked.name}, to compare: {several}", over))
    return tuple(found)


def play(program: Program, schedule: Schedule | Period, title: str, steps: int) -> Play:
    """Simulate one schedule, by cost and with one unit for each action."""
    by_cost = simulate(schedule, program, steps=steps)
    names = {str(unplaced(span.action)): 1.0 for span in by_cost.spans}
    by_turn = simulate(schedule, program, names, steps)
    keys = list(dict.fromkeys(sorted((span.partition, span.device, span.stream) for span in by_cost.spans)))
    rows = tuple(_row(program, by_cost.spans, *key) for key in keys)
    acts = tuple(_acts(program, by_cost, by_turn, keys))
    length = quantity(by_cost.makespan, "FLOP") if by_cost.unit == "flop" else f"{by_cost.makespan:.4g} s"
    return Play(title, rows, acts, by_cost.unit, length)


def _row(program: Program, spans: Sequence[Span], partition: int, device: str, stream: int) -> str:
    """Name a row by its partition, its device, and its stream where the device has several."""
    several = len({span.stream for span in spans if span.device == device}) > 1
    return f"{program.partitions[partition].name} · {device}" + (f" · stream {stream}" if several else "")


def _acts(
    program: Program, by_cost: Simulation, by_turn: Simulation, keys: Sequence[tuple[int, str, int]]
) -> Iterator[Act]:
    """Put the spans of both simulations together."""
    for span, turn in zip(by_cost.spans, by_turn.spans, strict=True):
        action = span.action
        name, key = _about(program, action.kind, action.index)
        yield Act(
            f"{action.kind}{action.index}" + (f"-{action.lag}" if action.lag else ""),
            SAYS[action.kind].format(name),
            keys.index((span.partition, span.device, span.stream)),
            span.step,
            key,
            (span.start, span.end),
            (turn.start, turn.end),
        )


def _about(program: Program, kind: Kind, index: int) -> tuple[str, int | str]:
    """Return the name of what an action acts on, and its partition's number or its gate's key."""
    if on_partition(kind):
        return program.partitions[index].name, index
    if index < len(program.boundaries):
        return program.boundaries[index].name, f"cut_{index}"
    return in_time(program, index - len(program.boundaries))


def in_time(program: Program, index: int) -> tuple[str, str]:
    """Return the name and the gate's key of a cut in time, by its place among those that a schedule names."""
    each = timed(program)[index]
    return each.name, f"time_{program.recurrences.index(each)}"
