"""Refuses a schedule that runs an action before what it needs, or that leaves one out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import lcm

from dnifx.errors import ScheduleError
from dnifx.ir import BAR, TRANSFERS, Action, Kind, Period, Program, Schedule
from dnifx.schedules.delays import delay_faults
from dnifx.schedules.dependencies import Answer, Links, answers_by_order, links, mentions, needs_in_order
from dnifx.schedules.drawing import exists, marked_grid
from dnifx.schedules.lags import lag_faults
from dnifx.schedules.language import described, on_partition, unplaced
from dnifx.schedules.orders import chosen_actions, differentiable, fires, trained, whole_step
from dnifx.schedules.tied import tied_faults
from dnifx.schedules.transfers import transfer_faults

BESIDE = TRANSFERS | {Kind.RENEW}
"""What stands beside the actions of a step, and is checked by itself."""


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a schedule: the action, its position (None where it is missing), the reason and the remedy."""

    action: Action
    place: int | None
    text: str


def validate(schedule: Schedule | Period, program: Program, *, partial: bool = False, diagnose: bool = False) -> None:
    """Check that every action stands after all it needs, and that none is missing, repeated or pointless.

    Of a period, the length is checked, then which partitions fire in each window, then each window as a partial step.

    Args:
        schedule: What one training step or one period would run.
        program: A program with partitions, boundaries and interfaces.
        partial: Accept a step in which partitions are idle or estimators are not fitted. A partition that runs backward
            still has to be updated, with all of its gradients.
        diagnose: Require that every target arrives.

    Raises:
        ScheduleError: The text marks the wrong action in the grid, and says what it needs and what to do.
    """
    if isinstance(schedule, Period):
        _validate_period(schedule, program)
        return
    wiring = links(program)
    within = {place: action for place, action in enumerate(schedule.actions) if action.kind not in BESIDE}
    fault = next(_faults(tuple(within.values()), wiring, partial, diagnose), None)
    if fault is not None:
        place = None if fault.place is None else list(within)[fault.place]
        raise ScheduleError(_report(replace(fault, place=place), schedule, program))
    late = lag_faults(schedule, wiring), delay_faults(schedule, wiring), tied_faults(schedule, wiring)
    checks = *late, transfer_faults(schedule, program)
    unfit = next(chain(*checks), None)
    if unfit is not None:
        raise ScheduleError(_report(_Fault(schedule.actions[unfit[0]], *unfit), schedule, program))


def _validate_period(period: Period, program: Program) -> None:
    length = lcm(*(partition.every for partition in program.partitions))
    if not period.windows or len(period.windows) % length:
        rates = ", ".join(f"{partition.name} every {partition.every}" for partition in program.partitions)
        raise ScheduleError(
            f"The period {period.name!r} has {len(period.windows)} windows, but its partitions repeat after {length} ({rates}). "
            f"Write {length} windows with {BAR} between them."
        )
    for number, window in enumerate(period.windows):
        for text in _wrong_firings(window, program, number):
            raise ScheduleError(f"Window {number} of the period {period.name!r}: {text}")
        validate(window, program, partial=True)


def _wrong_firings(window: Schedule, program: Program, number: int) -> Iterator[str]:
    """What is wrong with a window of a period because of the partitions' rates."""
    wiring, bare = links(program), tuple(map(unplaced, window.actions))
    rates = [partition.every for partition in program.partitions]
    for index, every in enumerate(rates):
        for kind in (Kind.FORWARD, Kind.BACKWARD) if index in trained(wiring) else (Kind.FORWARD,):
            action, rate = Action(kind, index), f"submod_{index} fires every {every}"
            if fires(every, number) and action not in bare:
                yield f"{rate}, so it fires in this window, but {action} is missing. Add it."
            if action in bare and not fires(every, number):
                yield f"{rate}, so it does not fire in this window. Remove {action}."
    answered = answers_by_order(bare, wiring)
    for boundary in program.boundaries:
        slower = any(rates[index] != rates[boundary.producer] for index in boundary.consumers)
        if slower and answered.get(boundary.index, Answer.ESTIMATE) is not Answer.ESTIMATE:
            yield (
                f"submod_{boundary.producer} would wait for the target of {boundary.name!r}, which arrives only once in "
                f"{boundary.messages} of its firings. Put S{boundary.index} before B{boundary.producer}."
            )
    order = [rates[action.index] for action in bare if on_partition(action.kind) and exists(action, wiring)]
    if order != sorted(order):
        yield "the actions of partitions with different rates are mixed. Write those of the faster partition first."


def _faults(actions: tuple[Action, ...], wiring: Links, partial: bool, diagnose: bool) -> Iterator[_Fault]:
    """What is wrong with the actions that are no transfers and renew nothing; positions count these alone."""
    bare = tuple(map(unplaced, actions))
    yield from _strangers(bare, wiring)
    yield from _disorder(actions, wiring)
    yield from _loose_ends(bare, wiring)
    if not partial:
        yield from _missing(bare, wiring, diagnose)


def _strangers(actions: tuple[Action, ...], wiring: Links) -> Iterator[_Fault]:
    """Actions of no partition or boundary of the program, actions that stand twice, and actions with nothing to do."""
    allowed = chosen_actions(whole_step(wiring, diagnose=True), wiring)
    first: dict[Action, int] = {}
    for place, action in enumerate(actions):
        if not exists(action, wiring):
            on = on_partition(action.kind)
            what, count = ("partition", len(wiring.partitions)) if on else ("boundary", len(wiring.gates))
            text = f"there is no {what} {action.index}: the program has {count}, numbered from 0. Remove it."
            yield _Fault(action, place, text)
        elif action in first:
            text = f"it already stands at position {first[action]}; a step runs it once. Remove one."
            yield _Fault(action, place, text)
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
        return f"partition {index} reads no trainable parameter, and no boundary that it consumes waits for a gradient."
    gate = wiring.gates[index]
    if kind is not Kind.FIT and not gate.in_time and gate.producer not in differentiable(wiring):
        return f"no trainable parameter stands before boundary {index}, so nothing takes its gradient."
    if kind is Kind.SYNTHESISE:
        return f"boundary {index} is locked and its estimator is not fitted: the producer takes the target instead."
    return f"nothing on boundary {index} is fitted."


def _disorder(actions: tuple[Action, ...], wiring: Links) -> Iterator[_Fault]:
    """Actions that stand before something they need."""
    needed, bare = needs_in_order(actions, wiring), tuple(map(unplaced, actions))
    positions = {action: place for place, action in enumerate(bare)}
    done: set[Action] = set()
    for place, action in enumerate(bare):
        unmet = next((need for need in needed[action] if need not in done), None)
        if unmet is not None:
            yield _Fault(action, place, _needing(action, unmet, positions.get(unmet), wiring))
        done.add(action)


def _needing(action: Action, need: Action, place: int | None, wiring: Links) -> str:
    """Say what an action needs, where that stands, what to do and, unless it is plain, why."""
    where = "is not in the schedule" if place is None else f"stands only at position {place}"
    remedy = f"{'Add' if place is None else 'Move'} {need} before {action}"
    reason = ""
    if need.kind is Kind.SYNTHESISE and action.kind is Kind.BACKWARD:
        remedy += f", or put T{need.index} before {action} to use the target"
    if need.kind is Kind.TARGET and action.kind is Kind.BACKWARD and wiring.gates[need.index].locked:
        reason = f"boundary {need.index} is locked; "
    if action.kind is Kind.UPDATE and need.index != action.index:
        reason = f"partition {need.index} uses a parameter of partition {action.index}; "
    return f"{reason}it needs {described(need, wiring.names)} before it, but {need} {where}. {remedy}."


def _loose_ends(actions: tuple[Action, ...], wiring: Links) -> Iterator[_Fault]:
    """Gradients that no update applies, and synthetic inputs that nothing runs on."""
    present = frozenset(actions)
    for place, action in enumerate(actions):
        if action.kind is Kind.BACKWARD:
            updates = [Action(Kind.UPDATE, owner) for owner in sorted(wiring.owners[action.index])]
            for update in (each for each in updates if each not in present):
                text = f"Add {described(update, wiring.names)}, or remove {action}."
                yield _Fault(action, place, f"its gradients are never applied. {text}")
        elif action.kind is Kind.INPUT and Action(Kind.FORWARD, action.index) not in present:
            yield _Fault(action, place, f"nothing runs on it. Add F{action.index}, or remove {action}.")


def _missing(actions: tuple[Action, ...], wiring: Links, diagnose: bool) -> Iterator[_Fault]:
    """Actions of a whole step that are not there; a boundary in time may be left out as a whole."""
    present = frozenset(actions)
    left_out = {index for index, gate in enumerate(wiring.gates) if gate.in_time and not mentions(present, index)}
    whole = chosen_actions(whole_step(wiring, diagnose), wiring)
    wanted = {action for action in whole if on_partition(action.kind) or action.index not in left_out}
    for action in sorted(wanted - present, key=lambda action: (action.index, str(action))):
        yield _Fault(action, None, "Add it, or say that the step is partial on purpose: fixed(schedule, partial=True).")


def _report(fault: _Fault, schedule: Schedule, program: Program) -> str:
    """The fault in words, above the grid around it; a missing action is drawn, marked, after the others."""
    what = described(fault.action, links(program).names)
    if fault.place is None:
        place, shown = len(schedule.actions), replace(schedule, actions=(*schedule.actions, fault.action))
        head = f"Schedule {schedule.name!r} is not complete: {what} is missing. {fault.text}"
    else:
        place, shown = fault.place, schedule
        head = f"Schedule {schedule.name!r} is wrong at position {place}, {what}: {fault.text}"
    picture = marked_grid(shown, program, place)
    return f"{head}\n{picture.around(picture.cells[place].slot)}"
