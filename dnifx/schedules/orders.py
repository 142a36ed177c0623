"""From what a step does to the order in which it does it: the deterministic schedules."""

import heapq
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dnifx.errors import ScheduleError
from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Answer, Gate, Links, answers_by_order, links, named, needs
from dnifx.schedules.language import listed, unplaced

Key = Callable[[Action], tuple[Any, ...]]


@dataclass(frozen=True)
class Choice:
    """What one step does, before it is put into order.

    Attributes:
        forward: Partitions that run forward.
        backward: Those of them that run backward and update.
        true: Boundaries whose producers wait for the target though they need not.
        fit: Whether estimators and input models learn.
        diagnose: Whether every target is wanted that can arrive.
    """

    forward: frozenset[int]
    backward: frozenset[int]
    true: frozenset[int] = frozenset()
    fit: bool = True
    diagnose: bool = False


def whole_step(wiring: Links, diagnose: bool = False) -> Choice:
    """Return the choice of a step in which every partition takes part."""
    return Choice(frozenset(wiring.partitions), trained(wiring, diagnose), diagnose=diagnose)


def differentiable(wiring: Links) -> frozenset[int]:
    """Return the partitions that a trainable parameter stands in or before, so that gradients can flow into them."""
    found: set[int] = set()
    for partition in wiring.partitions:
        fed = any(wiring.gates[boundary].producer in found for boundary in wiring.consumed[partition])
        if wiring.owners[partition] or fed:
            found.add(partition)
    return frozenset(found)


def trained(wiring: Links, diagnose: bool = False) -> frozenset[int]:
    """Return the partitions whose backward pass serves something: their parameters, or a target that is asked for."""
    live, found = differentiable(wiring), set[int]()
    for partition in wiring.partitions:
        gates = [wiring.gates[boundary] for boundary in wiring.consumed[partition]]
        learned = any(gate.producer in live and (gate.teaches_target or diagnose) for gate in gates)
        awaited = any(gate.producer in found and gate.locked for gate in gates)
        if wiring.owners[partition] or learned or awaited:
            found.add(partition)
    return frozenset(found)


def chosen_actions(choice: Choice, wiring: Links) -> frozenset[Action]:
    """Return the actions that a choice comes to, without an order."""
    found = {Action(Kind.FORWARD, index) for index in choice.forward}
    found |= {Action(Kind.INPUT, index) for index in choice.forward if wiring.imagines(index)}
    found |= {Action(Kind.BACKWARD, index) for index in choice.backward}
    found |= {Action(Kind.UPDATE, index) for index in choice.backward if wiring.owns[index]}
    live, ends = differentiable(wiring), wiring.last in choice.forward
    for boundary, gate in enumerate(wiring.gates):
        found |= {Action(kind, boundary) for kind in _at_boundary(boundary, gate, choice, live, ends)}
    return frozenset(found)


def _at_boundary(boundary: int, gate: Gate, choice: Choice, live: frozenset[int], ends: bool) -> Iterable[Kind]:
    if gate.in_time:
        yield from (Kind.SYNTHESISE,) if gate.producer in choice.backward else ()
        yield from (Kind.TARGET, Kind.FIT) if choice.fit and gate.fits and gate.consumers <= choice.backward else ()
        return
    produced = gate.producer in choice.forward
    arrives = produced and gate.producer in live and gate.consumers <= choice.backward
    asked = gate.producer in choice.backward
    waits = gate.locked or boundary in choice.true
    fitted = choice.fit and gate.fits and (ends or not gate.needs_end)
    fitted = fitted and (arrives if gate.needs_target else produced and gate.producer in live)
    blended = gate.locked and (gate.fits or gate.blends) and boundary not in choice.true
    if fitted or (asked and (blended or not waits)):
        yield Kind.SYNTHESISE
    if (fitted and gate.needs_target) or (arrives and choice.diagnose) or (asked and waits):
        yield Kind.TARGET
    if fitted or (choice.fit and gate.imagines and produced and gate.consumers & choice.forward):
        yield Kind.FIT


def arranged(
    actions: AbstractSet[Action], wiring: Links, key: Key, answered: Mapping[int, Answer]
) -> tuple[Action, ...]:
    """Put actions into an order that meets their needs: of those that can run, always the one with the least key."""
    waiting = {action: set(needs(action, actions, wiring, answered)) for action in actions}
    missing = sorted(set().union(*waiting.values()) - actions, key=str)
    if missing:
        raise ScheduleError(f"A step that holds {listed(actions)} lacks {listed(missing)}, which others of it need.")
    behind: dict[Action, list[Action]] = {action: [] for action in actions}
    for action, needed in waiting.items():
        for earlier in needed:
            behind[earlier].append(action)
    ready = [(key(action), str(action), action) for action, needed in waiting.items() if not needed]
    heapq.heapify(ready)
    order = []
    while ready:
        action = heapq.heappop(ready)[2]
        order.append(action)
        for later in behind[action]:
            waiting[later].discard(action)
            if not waiting[later]:
                heapq.heappush(ready, (key(later), str(later), later))
    return tuple(order)


_EAGER = {
    Kind.TARGET: 0,
    Kind.FIT: 1,
    Kind.UPDATE: 2,
    Kind.SYNTHESISE: 3,
    Kind.BACKWARD: 4,
    Kind.INPUT: 5,
    Kind.FORWARD: 5,
}


def eager(action: Action) -> tuple[int, int, int]:
    """Sorting key: finish all that can be finished before the next partition runs forward; backward from the last."""
    index = -action.index if action.kind is Kind.BACKWARD else action.index
    return _EAGER[action.kind], index, int(action.kind is Kind.FORWARD)


def sequential(program: Program, diagnose: bool = False) -> Schedule:
    """Partitions in order, each updated before the next runs forward, as far as its boundaries are unlocked.

    Locked boundaries make chains: forward to their end, then backward as the targets arrive. With every boundary
    locked this is backpropagation, each partition updated as soon as its gradients are there.

    Args:
        program: A program with partitions, boundaries and interfaces.
        diagnose: Have the target arrive at every boundary, also where nothing is fitted to it.

    Returns:
        The schedule; the same object for the same program.
    """
    return _sequential(links(program), diagnose)


@lru_cache(maxsize=32)
def _sequential(wiring: Links, diagnose: bool) -> Schedule:
    actions = chosen_actions(whole_step(wiring, diagnose), wiring)
    return Schedule("sequential", arranged(actions, wiring, eager, {}))


def backprop(program: Program, fit: bool = True) -> Schedule:
    """Every producer waits for the target: the gradients of backpropagation, whatever stands on the boundaries.

    Args:
        program: A program with partitions, boundaries and interfaces.
        fit: Fit the estimators to the true gradients, so that they are ready when they are used.

    Returns:
        The schedule; estimators that are fitted estimate after their producer's backward pass, which so uses the
        target.
    """
    return _backprop(links(program), fit)


@lru_cache(maxsize=32)
def _backprop(wiring: Links, fit: bool) -> Schedule:
    true = frozenset(range(len(wiring.gates)))
    choice = replace(whole_step(wiring, diagnose=True), true=true, fit=fit, diagnose=False)
    actions = chosen_actions(choice, wiring)
    answered = dict.fromkeys(true, Answer.TARGET)
    return Schedule("backprop", arranged(actions, wiring, eager, answered))


def without_fits(schedule: Schedule, program: Program) -> Schedule:
    """Return the schedule without the fits, and without the targets and estimates that only served them."""
    return _without_fits(schedule, links(program))


@lru_cache(maxsize=64)
def _without_fits(schedule: Schedule, wiring: Links) -> Schedule:
    bare = tuple(map(unplaced, schedule.actions))
    actions, answered = frozenset(bare), answers_by_order(bare, wiring)
    kept = {action for action in bare if action.kind in (Kind.FORWARD, Kind.UPDATE)}
    reached = list(kept)
    while reached:
        found = set(needs(reached.pop(), actions, wiring, answered)) & actions - kept
        kept |= found
        reached.extend(found)
    return replace(schedule, actions=tuple(action for action in schedule.actions if unplaced(action) in kept))


def diagnosed(schedule: Schedule, program: Program) -> Schedule:
    """Return the schedule with every target that can arrive in it, also where nothing is fitted to it.

    Args:
        schedule: A valid schedule of the program, whole or partial.
        program: The program.
    """
    return _diagnosed(schedule, links(program))


@lru_cache(maxsize=64)
def _diagnosed(schedule: Schedule, wiring: Links) -> Schedule:
    actions = {unplaced(action) for action in schedule.actions}
    live = differentiable(wiring)
    absent = {
        boundary: set(gate.consumers)
        for boundary, gate in enumerate(wiring.gates)
        if Action(Kind.TARGET, boundary) not in actions and gate.producer in live and not gate.in_time
    }
    order = []
    for action in schedule.actions:
        order.append(action)
        for boundary, awaited in absent.items():
            if action.kind is Kind.BACKWARD and action.index in awaited:
                awaited.discard(action.index)
                order += [] if awaited else [replace(action, kind=Kind.TARGET, index=boundary)]
    return replace(schedule, actions=tuple(order))


def with_time(schedule: Schedule, program: Program) -> Schedule:
    """Return the schedule with the actions of those boundaries in time of which it names none.

    The state that a window leaves gets its gradient just before its partition's backward pass; the estimator is fitted once all
    that take or leave the state ran backward.

    Args:
        schedule: A valid schedule of the program, whole or partial.
        program: The program.
    """
    return _with_time(schedule, links(program))


@lru_cache(maxsize=64)
def _with_time(schedule: Schedule, wiring: Links) -> Schedule:
    actions = {unplaced(action) for action in schedule.actions}
    order = list(schedule.actions)
    for boundary, gate in enumerate(wiring.gates):
        if gate.in_time and not named(boundary, actions):
            order = _placed_in_time(order, boundary, gate)
    return replace(schedule, actions=tuple(order))


def _placed_in_time(order: list[Action], boundary: int, gate: Gate) -> list[Action]:
    passes = [
        action for action in order if action.kind is Kind.BACKWARD and action.index in {gate.producer, *gate.consumers}
    ]
    fits = gate.fits and gate.consumers <= {action.index for action in passes}
    found = []
    for action in order:
        if action in passes and action.index == gate.producer:
            found.append(replace(action, kind=Kind.SYNTHESISE, index=boundary))
        found.append(action)
        if passes and action is passes[-1] and fits:
            found += [replace(action, kind=kind, index=boundary) for kind in (Kind.TARGET, Kind.FIT)]
    return found


def placed(schedule: Schedule, program: Program, devices: Iterable[str]) -> Schedule:
    """Return the schedule with a device for each partition, and targets and fits on a stream of their own.

    A target that has not arrived holds up its own stream alone, so that the producer goes on.

    Args:
        schedule: Any schedule of the program; devices and streams that it names are replaced.
        program: The program.
        devices: One for each partition, in order.

    Raises:
        ScheduleError: The number of devices is not that of the partitions.
    """
    wiring, names = links(program), tuple(devices)
    if len(names) != len(wiring.partitions):
        raise ScheduleError(
            f"{len(names)} devices were given for {len(wiring.partitions)} partitions; give one for each."
        )
    return replace(schedule, actions=tuple(_placed(action, names[wiring.place(action)]) for action in schedule.actions))


def _placed(action: Action, device: str) -> Action:
    return Action(action.kind, action.index, device, 1 if action.kind in (Kind.TARGET, Kind.FIT) else 0)
