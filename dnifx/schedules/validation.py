"""Refuses a schedule that runs an action before what it depends on, or that leaves one out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dnifx.errors import ScheduleError
from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Links, Sources, answers_by_order, links, named, needs
from dnifx.schedules.drawing import known, marked_grid
from dnifx.schedules.language import described, on_partition, unplaced
from dnifx.schedules.orders import chosen_actions, differentiable, whole_step


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a schedule: the action, its position (None where it is lacking), why and what to do."""

    action: Action
    place: int | None
    text: str


def validate(schedule: Schedule, program: Program, *, partial: bool = False, diagnose: bool = False) -> None:
    """Check that every action comes after all it depends on, and that none is lacking, repeated or pointless.

    Args:
        schedule: What one training step would run.
        program: A program with partitions, boundaries and interfaces.
        partial: Accept a step in which partitions are idle or estimators are not fitted. What takes part does so
            whole: what runs backward is updated, by all of its gradients.
        diagnose: Require that every target arrives.

    Raises:
        ScheduleError: With the action that is wrong marked in the grid, what it needs, and what to do.
    """
    bare = tuple(map(unplaced, schedule.actions))
    fault = next(_faults(bare, links(program), partial, diagnose), None)
    if fault is not None:
        raise ScheduleError(_report(fault, schedule, program))


def _faults(actions: tuple[Action, ...], wiring: Links, partial: bool, diagnose: bool) -> Iterator[_Fault]:
    yield from _strangers(actions, wiring)
    yield from _disorder(actions, wiring)
    yield from _loose_ends(actions, wiring)
    if not partial:
        yield from _lacking(actions, wiring, diagnose)


def _strangers(actions: tuple[Action, ...], wiring: Links) -> Iterator[_Fault]:
    """Actions that the program has no partition or boundary for, that stand twice, or that have nothing to do."""
    allowed = chosen_actions(whole_step(wiring, diagnose=True), wiring)
    first: dict[Action, int] = {}
    for place, action in enumerate(actions):
        if not known(action, wiring):
            count = len(wiring.partitions) if on_partition(action.kind) else len(wiring.gates)
            what = "partitions" if on_partition(action.kind) else "boundaries"
            yield _Fault(action, place, f"the program has {count} {what}, numbered from 0. Remove it.")
        elif action in first:
            yield _Fault(
                action, place, f"it already stands at position {first[action]}; a step runs it once. Remove one."
            )
        elif action not in allowed:
            yield _Fault(action, place, f"{_pointless(action, wiring)} Remove it.")
        first.setdefault(action, place)


def _pointless(action: Action, wiring: Links) -> str:
    kind, index = action.kind, action.index
    if kind is Kind.UPDATE:
        return f"partition {index} owns no trainable parameter."
    if kind is Kind.INPUT:
        return f"no boundary that partition {index} consumes has a synthetic input model."
    if kind is Kind.BACKWARD:
        return f"partition {index} reads no trainable parameter and no boundary that it consumes waits for a gradient."
    gate = wiring.gates[index]
    if kind is not Kind.FIT and not gate.in_time and gate.producer not in differentiable(wiring):
        return f"no trainable parameter stands before boundary {index}, so nothing takes its gradient."
    if kind is Kind.SYNTHESISE:
        return f"boundary {index} is locked and its estimator is not fitted: the producer takes the target instead."
    return f"nothing on boundary {index} is fitted."


def _disorder(actions: tuple[Action, ...], wiring: Links) -> Iterator[_Fault]:
    """Actions that something they need does not stand before."""
    present, answered = frozenset(actions), answers_by_order(actions, wiring)
    positions = {action: place for place, action in enumerate(actions)}
    done: set[Action] = set()
    for place, action in enumerate(actions):
        lacking = [need for need in needs(action, present, wiring, answered) if need not in done]
        if lacking:
            yield _Fault(action, place, _needing(action, lacking[0], positions, wiring, answered))
        done.add(action)


def _needing(action: Action, need: Action, positions: dict[Action, int], wiring: Links, answered: Sources) -> str:
    """Say what an action needs, why where that is not plain, where it stands, and what to do."""
    place = positions.get(need)
    where = "which is not in the schedule" if place is None else f"which stands only at position {place}"
    remedy = f"Add {need} before {action}" if place is None else f"Move {need} before {action}"
    reason = ""
    if need.kind is Kind.SYNTHESISE and action.kind is Kind.BACKWARD:
        remedy += f", or have T{need.index} stand before {action} to use the target"
    if need.kind is Kind.TARGET and action.kind is Kind.BACKWARD and wiring.gates[need.index].locked:
        reason = f"boundary {need.index} is locked; "
    if action.kind is Kind.UPDATE and need.index != action.index:
        reason = f"partition {need.index} uses a parameter of partition {action.index}; "
    return f"{reason}it needs {described(need, wiring.names)} before it, {where}. {remedy}."


def _loose_ends(actions: tuple[Action, ...], wiring: Links) -> Iterator[_Fault]:
    """Gradients that no update applies, and synthetic inputs that nothing runs on."""
    present = frozenset(actions)
    for place, action in enumerate(actions):
        if action.kind is Kind.BACKWARD:
            for owner in sorted(wiring.owners[action.index]):
                update = Action(Kind.UPDATE, owner)
                if update not in present:
                    yield _Fault(
                        action,
                        place,
                        f"its gradients are never applied. Add {described(update, wiring.names)}, or remove {action}.",
                    )
        elif action.kind is Kind.INPUT and Action(Kind.FORWARD, action.index) not in present:
            yield _Fault(action, place, f"nothing runs on it. Add F{action.index}, or remove {action}.")


def _lacking(actions: tuple[Action, ...], wiring: Links, diagnose: bool) -> Iterator[_Fault]:
    """Actions of a whole step that are not there."""
    present = frozenset(actions)
    quiet_loggers = {index for index, gate in enumerate(wiring.gates) if gate.in_time and not named(index, present)}
    whole = chosen_actions(whole_step(wiring, diagnose), wiring)
    wanted = {action for action in whole if on_partition(action.kind) or action.index not in quiet_loggers}
    for action in sorted(wanted - present, key=lambda action: (action.index, str(action))):
        text = "Add it, or say that the step is meant to be partial: fixed(schedule, partial=True)."
        yield _Fault(action, None, text)


def _report(fault: _Fault, schedule: Schedule, program: Program) -> str:
    """The fault in words, above the grid around it; an action that is lacking is drawn, marked, behind the others."""
    what = described(fault.action, links(program).names)
    if fault.place is None:
        place, shown = len(schedule.actions), replace(schedule, actions=(*schedule.actions, fault.action))
        head = f"Schedule {schedule.name!r} is not complete: {what} is lacking. {fault.text}"
    else:
        place, shown = fault.place, schedule
        head = f"Schedule {schedule.name!r} is wrong at position {place}, {what}: {fault.text}"
    picture = marked_grid(shown, program, place)
    return f"{head}\n{picture.around(picture.cells[place].slot)}"
