"""What each action of a schedule waits for.

``Links`` says which partition gives values to which: it follows from the program alone. The order of a schedule adds where
each backward pass takes its gradient from: the estimate where ``S`` stands before the producer's ``B``, the target where
only ``T`` does, and both where a locked interface also estimates. Together they give the needs of every action.

Boundaries in time are numbered after the others. Their ``S`` gives a gradient to the state at the end of a window. Their
``T`` and ``M`` concern the state at its start, which the window before has left.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any

from dnifx.errors import ScheduleError
from dnifx.ir import TRANSFERS, Action, Boundary, Interface, Kind, Partition, Program, Recurrence, Schedule
from dnifx.schedules.language import on_partition, unplaced


@dataclass(frozen=True)
class Gate:
    """A boundary and its interface, as far as the order of actions depends on them.

    Attributes:
        producer: Index of the partition that makes its values.
        consumers: Indices of the partitions that take them.
        locked: Whether the producer waits for the target.
        fits: Whether the estimator learns.
        has_input_model: Whether a synthetic input model stands in for the values, so that consumers need not wait.
        blends: Whether a locked interface gives its producer the estimate as well as the target.
        needs_target: Whether the estimator learns from the target.
        needs_loss: Whether the estimator learns from the loss.
        needs_error: Whether the estimator answers from the error of the model's output.
        in_time: Whether it stands between a window and the next.
        fit_reaches_core: Whether the fit also gives gradients to the partition, so that the update has to wait for it.
        reads: Partitions whose values the estimator reads beside those of the boundary.
        late: Steps by which the producer gets the target late.
        copies: Parameters that the estimator copies, by the partition that updates them.
        refresh: After how many steps it does so again.
    """

    producer: int
    consumers: frozenset[int]
    locked: bool = False
    fits: bool = True
    has_input_model: bool = False
    blends: bool = False
    needs_target: bool = True
    needs_loss: bool = False
    needs_error: bool = False
    in_time: bool = False
    fit_reaches_core: bool = False
    reads: frozenset[int] = frozenset()
    late: int = 0
    copies: tuple[tuple[int, tuple[str, ...]], ...] = ()
    refresh: int = 1

    @property
    def mixes(self) -> bool:
        """Whether the producer takes both the estimate and the target."""
        return self.locked and (self.fits or self.blends)


@dataclass(frozen=True)
class Links:
    """Who gives values, gradients and parameters to whom.

    ``names`` and ``gates`` are indexed by boundary, the others by partition.

    Attributes:
        names: Name of each boundary.
        gates: Each boundary with its interface.
        sources: Partitions whose values it takes.
        direct: Those sources whose values no synthetic input stands in for.
        produced: Boundaries that it produces, without those in time.
        consumed: Boundaries that it consumes, without those in time.
        owns: Whether it owns trainable parameters.
        owners: Partitions that own a trainable parameter which it reads.
        users: Partitions that read a trainable parameter which it owns, itself among them.
    """

    names: tuple[str, ...]
    gates: tuple[Gate, ...]
    sources: tuple[frozenset[int], ...]
    direct: tuple[frozenset[int], ...]
    produced: tuple[tuple[int, ...], ...]
    consumed: tuple[tuple[int, ...], ...]
    owns: tuple[bool, ...]
    owners: tuple[frozenset[int], ...]
    users: tuple[frozenset[int], ...]

    @property
    def partitions(self) -> range:
        """Indices of the partitions."""
        return range(len(self.sources))

    @property
    def last(self) -> int:
        """Index of the last partition, which computes output and loss."""
        return len(self.sources) - 1

    @cached_property
    def in_time(self) -> tuple[int, ...]:
        """The boundaries in time."""
        return tuple(index for index, gate in enumerate(self.gates) if gate.in_time)

    def has_input_model(self, partition: int) -> bool:
        """Whether a synthetic input stands in for some of the partition's inputs."""
        return any(self.gates[boundary].has_input_model for boundary in self.consumed[partition])

    def place(self, action: Action) -> int:
        """The partition where an action runs: its own index, or the producer of its boundary."""
        return action.index if on_partition(action.kind) else self.gates[action.index].producer


class Answer(StrEnum):
    """Where a producer's backward pass takes the gradient of a boundary from."""

    ESTIMATE = "estimate"
    TARGET = "target"
    BOTH = "both"


Answers = Mapping[int, Answer]
"""The answer of each boundary whose producer runs backward."""


def links(program: Program) -> Links:
    """Return the links of a program; equal partitions, boundaries and interfaces give the same object.

    Raises:
        ScheduleError: A boundary has no interface.
    """
    interfaces = {interface.boundary: interface for interface in program.interfaces}
    bare = [boundary.name for boundary in program.boundaries if boundary.index not in interfaces]
    if bare:
        raise ScheduleError(
            f"No interface stands on {bare}, so the order of actions is unknown. Run the pass 'insert' first."
        )
    gates = [_gate(boundary, interfaces[boundary.index], program) for boundary in program.boundaries]
    in_time = timed(program)
    names = (*(each.name for each in program.boundaries), *(each.name for each in in_time))
    return _links(program.partitions, program.boundaries, names, (*gates, *map(_gate_in_time, in_time)))


def timed(program: Program) -> tuple[Recurrence, ...]:
    """Return the boundaries in time that a schedule names.

    Those whose gradient is exact are not among them. There are none where a window waits for the next one.
    """
    known = tuple(each for each in program.recurrences if each.interface is not None and each.exact is None)
    return () if any(each.interface.locked for each in known if each.interface is not None) else known


def _gate(boundary: Boundary, interface: Interface, program: Program) -> Gate:
    homes = {program.partition_of[name] for name in interface.reads if name in program.partition_of}
    copies = (
        (each.index, tuple(name for name in each.parameters if name in interface.mirrors))
        for each in program.partitions
    )
    return Gate(
        boundary.producer,
        frozenset(boundary.consumers),
        locked=interface.locked,
        fits=interface.fits,
        has_input_model=interface.input_model is not None,
        blends=interface.blends,
        needs_target=interface.needs_target,
        needs_loss=interface.needs_loss,
        needs_error=interface.needs_error,
        reads=frozenset(homes - {boundary.producer}),
        late=interface.late,
        copies=tuple((index, names) for index, names in copies if names),
        refresh=interface.refresh,
    )


def _gate_in_time(each: Recurrence) -> Gate:
    fits = each.interface is not None and each.interface.fits
    reaches_core = fits and (each.cut.into_core or each.cut.auxiliary)
    return Gate(each.producer, frozenset(each.consumers), fits=fits, in_time=True, fit_reaches_core=reaches_core)


@lru_cache(maxsize=32)
def _links(
    partitions: tuple[Partition, ...], boundaries: tuple[Boundary, ...], names: tuple[str, ...], gates: tuple[Gate, ...]
) -> Links:
    inside = [(index, gate) for index, gate in enumerate(gates) if not gate.in_time]
    replaced = frozenset(index for index, gate in inside if gate.has_input_model)
    produced, consumed = (
        _listed((gate.producer, index) for index, gate in inside),
        _listed((consumer, index) for index, gate in inside for consumer in gate.consumers),
    )
    owning = _listed((name, each.index) for each in partitions for name in each.parameters)
    owners = [
        frozenset(owner for name in (*each.parameters, *each.uses) for owner in owning.get(name, ()))
        for each in partitions
    ]
    users = _listed((owner, user) for user, of in enumerate(owners) for owner in of)
    return Links(
        names=names,
        gates=gates,
        sources=_sources(partitions, boundaries, frozenset()),
        direct=_sources(partitions, boundaries, replaced),
        produced=tuple(produced.get(each.index, ()) for each in partitions),
        consumed=tuple(consumed.get(each.index, ()) for each in partitions),
        owns=tuple(bool(each.parameters) for each in partitions),
        owners=tuple(owners),
        users=tuple(frozenset(users.get(each.index, ())) for each in partitions),
    )


def _listed(pairs: Iterable[tuple[Any, int]]) -> dict[Any, tuple[int, ...]]:
    """Return the numbers that stand beside each key, in order."""
    found: dict[Any, list[int]] = {}
    for key, number in pairs:
        found.setdefault(key, []).append(number)
    return {key: tuple(numbers) for key, numbers in found.items()}


def _sources(
    partitions: tuple[Partition, ...], boundaries: tuple[Boundary, ...], replaced: frozenset[int]
) -> tuple[frozenset[int], ...]:
    """Partitions that give values to each partition; values of ``replaced`` boundaries come from input models instead."""
    consumed = _listed((user, place) for place, each in enumerate(boundaries) for user in each.consumers)
    makers = _listed((name, each.index) for each in partitions for name in each.outputs)
    found = []
    for each in partitions:
        taken = [boundaries[place] for place in consumed.get(each.index, ())]
        hidden = {value for boundary in taken if boundary.index in replaced for value in boundary.values}
        by_name = {maker for name in {*each.inputs} - hidden for maker in makers.get(name, ()) if maker < each.index}
        found.append(frozenset(by_name | {each.producer for each in taken if each.index not in replaced}))
    return tuple(found)


def answers(schedule: Schedule, program: Program) -> Answers:
    """Return where each producer that runs backward takes the gradient of its boundary from.

    It takes the estimate where ``S`` stands before its ``B``, even if the target has arrived as well. It takes the
    target where ``T`` stands before its ``B`` and ``S`` does not. A locked interface that also estimates, such as
    BP(lambda), gives both.
    """
    return answers_by_order(schedule.actions, links(program))


def answers_by_order(actions: Iterable[Action], wiring: Links) -> Answers:
    """Return the answers by boundary."""
    position = {unplaced(action): place for place, action in enumerate(actions) if not action.lag}
    found = {}
    for boundary, gate in enumerate(wiring.gates):
        backward = position.get(Action(Kind.BACKWARD, gate.producer))
        if backward is not None and gate.in_time:
            found[boundary] = Answer.ESTIMATE
        elif backward is not None:
            estimated = position.get(Action(Kind.SYNTHESISE, boundary), backward) < backward
            arrived = position.get(Action(Kind.TARGET, boundary), backward) < backward
            found[boundary] = _answer(gate, estimated, arrived)
    return found


def _answer(gate: Gate, estimated: bool, arrived: bool) -> Answer:
    if gate.locked:
        return Answer.BOTH if gate.mixes and estimated else Answer.TARGET
    return Answer.TARGET if arrived and not estimated else Answer.ESTIMATE


def needs(action: Action, actions: Set[Action], wiring: Links, answered: Answers) -> tuple[Action, ...]:
    """Return the actions that have to stand before ``action`` in a schedule of ``actions``, which have no places.

    The result may name actions that the schedule lacks. ``answered`` comes from ``answers``. A producer of a boundary
    that it leaves out takes the estimate, or the target where the boundary is locked.
    """
    index = action.index
    match action.kind:
        case Kind.FORWARD if (imagined := Action(Kind.INPUT, index)) in actions:
            return imagined, *_each(Kind.FORWARD, wiring.direct[index])
        case Kind.FORWARD:
            return _each(Kind.FORWARD, wiring.sources[index])
        case Kind.SYNTHESISE:
            return _synthesise(index, actions, wiring, answered)
        case Kind.BACKWARD:
            return _backward(index, actions, wiring, answered)
        case Kind.TARGET:
            return _each(Kind.BACKWARD, wiring.gates[index].consumers)
        case Kind.FIT:
            return _fit(index, actions, wiring)
        case Kind.UPDATE:
            fits = _each(Kind.FIT, (b for b in wiring.in_time if wiring.gates[b].fit_reaches_core))
            return *_each(Kind.BACKWARD, wiring.users[index]), *(fit for fit in fits if fit in actions)
        case _:
            return ()


def needs_in_order(actions: Iterable[Action], wiring: Links) -> dict[Action, tuple[Action, ...]]:
    """Return the needs of each action of a schedule within its step; they and the keys have no place and no lag.

    A fit with a lag needs nothing of its own step. Transfers are left out; ``dnifx.schedules.transfers`` says what they need.
    """
    within = tuple(action for action in actions if action.kind not in TRANSFERS)
    late = {unplaced(action) for action in within if action.lag and action.kind is Kind.FIT}
    bare = tuple(map(unplaced, within))
    present, answered = frozenset(bare), answers_by_order(within, wiring)
    return {action: () if action in late else needs(action, present, wiring, answered) for action in bare}


def _synthesise(index: int, actions: Set[Action], wiring: Links, answered: Answers) -> tuple[Action, ...]:
    producer = wiring.gates[index].producer
    backward = Action(Kind.BACKWARD, producer)
    late = answered.get(index) is Answer.TARGET and backward in actions and not wiring.gates[index].in_time
    error = (Action(Kind.FORWARD, wiring.last),) if wiring.gates[index].needs_error else ()
    reads = _each(Kind.FORWARD, wiring.gates[index].reads)
    return Action(Kind.FORWARD, producer), *reads, *((backward,) if late else ()), *error


def _backward(index: int, actions: Set[Action], wiring: Links, answered: Answers) -> tuple[Action, ...]:
    found = [Action(Kind.FORWARD, index)]
    for boundary in wiring.in_time:
        if wiring.gates[boundary].producer == index and mentions(actions, boundary):
            found.append(Action(Kind.SYNTHESISE, boundary))
    for boundary in wiring.produced[index]:
        gate = wiring.gates[boundary]
        answer = answered.get(boundary, _answer(gate, estimated=True, arrived=False))
        if answer is not Answer.TARGET:
            found.append(Action(Kind.SYNTHESISE, boundary))
        if answer is not Answer.ESTIMATE:
            found.append(Action(Kind.TARGET, boundary))
    return tuple(found)


def _fit(index: int, actions: Set[Action], wiring: Links) -> tuple[Action, ...]:
    """The estimator's fit needs S and what it learns from; the input model's needs the consumers' I and the producer's F.

    Where both learn, the schedule may hold the needs of one alone.
    """
    gate = wiring.gates[index]
    if gate.in_time:
        asked = Action(Kind.SYNTHESISE, index)
        return (Action(Kind.TARGET, index), *((asked,) if asked in actions else ()))
    target = (Action(Kind.TARGET, index),) if gate.needs_target else ()
    loss = (Action(Kind.FORWARD, wiring.last),) if gate.needs_loss else ()
    of_estimator = (Action(Kind.SYNTHESISE, index), *target, *loss) if gate.fits else ()
    if not gate.has_input_model:
        return of_estimator
    inputs = _each(Kind.INPUT, gate.consumers)
    of_model = (Action(Kind.FORWARD, gate.producer), *(tuple(each for each in inputs if each in actions) or inputs))
    held = [each for each in (of_estimator, of_model) if each and actions >= frozenset(each)]
    return tuple(action for each in held or (of_estimator, of_model) for action in each)


def mentions(actions: Set[Action], boundary: int) -> bool:
    """Whether some of the actions belong to a boundary."""
    return any(Action(kind, boundary) in actions for kind in (Kind.SYNTHESISE, Kind.TARGET, Kind.FIT))


def _each(kind: Kind, indices: Iterable[int]) -> tuple[Action, ...]:
    return tuple(Action(kind, index) for index in sorted(indices))
