"""The deterministic schedules: what a step does, and the order in which it does it."""

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import lru_cache
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from math import lcm
from typing import Any, TypeVar

from dnifx.errors import ScheduleError
from dnifx.ir import Action, Kind, Period, Program, Schedule
from dnifx.schedules.dependencies import Answer, Answers, Gate, Links, links, mentions, needs, needs_in_order
from dnifx.schedules.language import listed, unplaced

Key = Callable[[Action], tuple[Any, ...]]
"""Where several actions could run next, the one with the least key does."""

AnySchedule = TypeVar("AnySchedule", bound=Schedule | Period)


@dataclass(frozen=True)
class Choice:
    """What one step does, not yet in order.

    Attributes:
        forward: Partitions that run forward.
        backward: Those of them that run backward and update.
        true: Boundaries whose producers wait for the target although they need not.
        fit: Whether estimators and input models learn.
        diagnose: Whether every target that can arrive is wanted.
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
    """Return the partitions that gradients flow into: they, or those that feed them, read a trainable parameter."""
    found: set[int] = set()
    for partition in wiring.partitions:
        fed = any(wiring.gates[boundary].producer in found for boundary in wiring.consumed[partition])
        if wiring.owners[partition] or fed:
            found.add(partition)
    return frozenset(found)


def trained(wiring: Links, diagnose: bool = False) -> frozenset[int]:
    """Return the partitions whose backward pass is useful: for their parameters, or for a target that is wanted."""
    live, found = differentiable(wiring), set[int]()
    for partition in wiring.partitions:
        gates = [wiring.gates[boundary] for boundary in wiring.consumed[partition]]
        learned = any(gate.producer in live and (diagnose or (gate.fits and gate.needs_target)) for gate in gates)
        awaited = any(gate.producer in found and gate.locked for gate in gates)
        if wiring.owners[partition] or learned or awaited:
            found.add(partition)
    return frozenset(found)


def chosen_actions(choice: Choice, wiring: Links) -> frozenset[Action]:
    """Return the actions of a choice, not in order."""
    found = {Action(Kind.FORWARD, index) for index in choice.forward}
    found |= {Action(Kind.INPUT, index) for index in choice.forward if wiring.has_input_model(index)}
    found |= {Action(Kind.BACKWARD, index) for index in choice.backward}
    found |= {Action(Kind.UPDATE, index) for index in choice.backward if wiring.owns[index]}
    live, ends = differentiable(wiring), wiring.last in choice.forward
    for boundary, gate in enumerate(wiring.gates):
        found |= {Action(kind, boundary) for kind in _at_boundary(boundary, gate, choice, live, ends)}
    return frozenset(found)


def _at_boundary(boundary: int, gate: Gate, choice: Choice, live: frozenset[int], ends: bool) -> Iterable[Kind]:
    """The actions of one boundary; ``ends`` says whether the last partition runs, so that there is a loss."""
    if gate.in_time:
        yield from (Kind.SYNTHESISE,) if gate.producer in choice.backward else ()
        yield from (Kind.TARGET, Kind.FIT) if choice.fit and gate.fits and gate.consumers <= choice.backward else ()
        return
    produced = gate.producer in choice.forward
    arrives = produced and gate.producer in live and gate.consumers <= choice.backward
    asked = gate.producer in choice.backward
    waits = gate.locked or boundary in choice.true
    fitted = choice.fit and gate.fits and (ends or not (gate.needs_loss or gate.needs_error))
    fitted = fitted and (arrives if gate.needs_target else produced and gate.producer in live)
    mixed = gate.mixes and boundary not in choice.true
    if fitted or (asked and (mixed or not waits)):
        yield Kind.SYNTHESISE
    if (fitted and gate.needs_target) or (arrives and choice.diagnose) or (asked and waits):
        yield Kind.TARGET
    if fitted or (choice.fit and gate.has_input_model and produced and gate.consumers & choice.forward):
        yield Kind.FIT


_BEFORE_FORWARD = (Kind.TARGET, Kind.FIT, Kind.UPDATE, Kind.SYNTHESISE, Kind.BACKWARD)


def eager(action: Action) -> tuple[int, int, int]:
    """Key: finish whatever can be finished before the next partition runs forward; go backward from the last."""
    index = -action.index if action.kind is Kind.BACKWARD else action.index
    rank = [*_BEFORE_FORWARD, action.kind].index(action.kind)
    return rank, index, int(action.kind is Kind.FORWARD)


def arranged(
    name: str, actions: AbstractSet[Action], wiring: Links, key: Key = eager, answered: Answers | None = None
) -> Schedule:
    """Return a schedule of actions, each after what it needs; of those that could run next, the least key comes first.

    ``answered`` says where producers take their gradients from; see ``needs``.

    Raises:
        ScheduleError: An action needs one that is not among them.
    """
    waiting = {action: needs(action, actions, wiring, answered or {}) for action in actions}
    missing = set[Action]().union(*waiting.values()) - actions
    if missing:
        raise ScheduleError(f"A step of {listed(actions)} lacks {listed(missing)}, which other actions of it need.")
    sorter = TopologicalSorter(waiting)
    sorter.prepare()
    ready: list[tuple[tuple[Any, ...], str, Action]] = []
    order: list[Action] = []
    while sorter.is_active():
        for action in sorter.get_ready():
            heappush(ready, (key(action), str(action), action))
        order.append(heappop(ready)[2])
        sorter.done(order[-1])
    return Schedule(name, tuple(order))


def sequential(program: Program, diagnose: bool = False) -> Schedule:
    """Run the partitions in order and update each before the next runs forward, as far as boundaries are unlocked.

    Locked boundaries form chains: forward to the end of the chain, then backward as the targets arrive. If every
    boundary is locked, this is backpropagation, in which each partition is updated as soon as its gradients are there.
    With ``diagnose``, the target arrives at every boundary, even where nothing is fitted to it. The same program gives
    the same object.
    """
    wiring = links(program)
    return _sequential(wiring, frozenset(wiring.partitions), diagnose)


def sequential_period(program: Program) -> Period:
    """Return the period in which each window runs the partitions that fire in it, in order.

    If every partition fires in every window, the period has one window.
    """
    length = lcm(*(partition.every for partition in program.partitions))
    return Period("sequential", tuple(sequential_window(program, window) for window in range(length)))


def sequential_window(program: Program, window: int) -> Schedule:
    """Return the schedule of one window, counted from 0: the partitions that fire in it run in order."""
    firing = frozenset(each.index for each in program.partitions if fires(each.every, window))
    return _sequential(links(program), firing, False)


@lru_cache(maxsize=64)
def _sequential(wiring: Links, firing: frozenset[int], diagnose: bool) -> Schedule:
    choice = Choice(firing, trained(wiring, diagnose) & firing, diagnose=diagnose)
    return arranged("sequential", chosen_actions(choice, wiring), wiring)


def fires(every: int, window: int) -> bool:
    """Whether a partition that fires once in ``every`` windows does so in this one; windows count from 0."""
    return (window + 1) % every == 0


def backprop(program: Program, fit: bool = True) -> Schedule:
    """Let every producer wait for the target: the gradients are those of backpropagation, whatever the estimators.

    With ``fit``, the estimators are fitted to the true gradients, so that they are ready when they are used. They
    answer after their producer's backward pass, which takes the target.
    """
    return _backprop(links(program), fit)


@lru_cache(maxsize=32)
def _backprop(wiring: Links, fit: bool) -> Schedule:
    true = frozenset(range(len(wiring.gates)))
    choice = replace(whole_step(wiring, diagnose=True), true=true, fit=fit, diagnose=False)
    answered = dict.fromkeys(true, Answer.TARGET)
    return arranged("backprop", chosen_actions(choice, wiring), wiring, answered=answered)


PHASES = (Kind.INPUT, Kind.FORWARD, Kind.SYNTHESISE, Kind.BACKWARD, Kind.UPDATE, Kind.TARGET, Kind.FIT)


def in_phases(action: Action) -> tuple[int, int]:
    """Key: all that is of one kind stands together."""
    return PHASES.index(action.kind), -action.index if action.kind is Kind.BACKWARD else action.index


def phases(program: Program) -> Schedule:
    """Run all partitions forward, ask all estimators, then all backward passes, all updates, and all fits.

    The numbers are those of ``sequential``, but for parameters that partitions share. All activations are held at once.
    """
    return _phases(links(program))


@lru_cache(maxsize=32)
def _phases(wiring: Links) -> Schedule:
    return arranged("phases", chosen_actions(whole_step(wiring), wiring), wiring, in_phases)


def without_fits(schedule: Schedule, program: Program) -> Schedule:
    """Return the schedule without the fits, and without the targets and estimates that only the fits need."""
    return _without_fits(schedule, links(program))


@lru_cache(maxsize=64)
def _without_fits(schedule: Schedule, wiring: Links) -> Schedule:
    needed = needs_in_order(schedule.actions, wiring)
    kept = {action for action in needed if action.kind in (Kind.FORWARD, Kind.UPDATE, Kind.RENEW)}
    while found := {need for action in kept for need in needed[action]} & needed.keys() - kept:
        kept |= found
    return replace(schedule, actions=tuple(action for action in schedule.actions if unplaced(action) in kept))


def diagnosed(schedule: Schedule, program: Program) -> Schedule:
    """Return a valid schedule, whole or partial, with every target that can arrive, even if nothing is fitted to it."""
    return _diagnosed(schedule, links(program))


@lru_cache(maxsize=64)
def _diagnosed(schedule: Schedule, wiring: Links) -> Schedule:
    actions, order = {unplaced(action) for action in schedule.actions}, list(schedule.actions)
    live = differentiable(wiring)
    for boundary, gate in reversed([*enumerate(wiring.gates)]):  # targets that follow one action keep their order
        absent = Action(Kind.TARGET, boundary) not in actions and gate.producer in live and not gate.in_time
        passes = _backward_passes(order, gate.consumers)
        if absent and passes and len(passes) == len(gate.consumers):
            order.insert(order.index(passes[-1]) + 1, replace(passes[-1], kind=Kind.TARGET, index=boundary))
    return replace(schedule, actions=tuple(order))


def with_time(schedule: Schedule, program: Program) -> Schedule:
    """Return a valid schedule, whole or partial, with the actions of boundaries in time that it does not mention.

    The state at a window's end gets its gradient just before its partition runs backward. The estimator is fitted once
    every partition that takes or leaves the state has run backward.
    """
    return _with_time(schedule, links(program))


@lru_cache(maxsize=64)
def _with_time(schedule: Schedule, wiring: Links) -> Schedule:
    actions, order = {unplaced(action) for action in schedule.actions}, list(schedule.actions)
    for boundary, gate in enumerate(wiring.gates):
        if gate.in_time and not mentions(actions, boundary):
            passes = _backward_passes(order, gate.consumers | {gate.producer})
            for action in _backward_passes(order, {gate.producer}):
                order.insert(order.index(action), replace(action, kind=Kind.SYNTHESISE, index=boundary))
            if passes and gate.fits and gate.consumers <= {action.index for action in passes}:
                learned = [replace(passes[-1], kind=kind, index=boundary) for kind in (Kind.TARGET, Kind.FIT)]
                after = order.index(passes[-1]) + 1
                order[after:after] = learned
    return replace(schedule, actions=tuple(order))


def _backward_passes(order: Iterable[Action], partitions: AbstractSet[int]) -> list[Action]:
    """The backward passes of some partitions, in order."""
    return [action for action in order if action.kind is Kind.BACKWARD and action.index in partitions]


def placed(schedule: AnySchedule, program: Program, devices: Iterable[str]) -> AnySchedule:
    """Return a schedule or a period with a device for each partition, in place of those that it names.

    Targets and fits get a stream of their own: a target that has not arrived does not hold up its producer.

    Raises:
        ScheduleError: The number of devices is not the number of partitions.
    """
    wiring, names = links(program), tuple(devices)
    if len(names) != len(wiring.partitions):
        raise ScheduleError(
            f"{len(names)} devices were given for {len(wiring.partitions)} partitions; give one for each."
        )
    if isinstance(schedule, Period):
        return replace(schedule, windows=tuple(placed(each, program, names) for each in schedule.windows))
    return replace(schedule, actions=tuple(_placed(action, names[wiring.place(action)]) for action in schedule.actions))


def _placed(action: Action, device: str) -> Action:
    return replace(action, device=device, stream=1 if action.kind in (Kind.TARGET, Kind.FIT) else 0)
