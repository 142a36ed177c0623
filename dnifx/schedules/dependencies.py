"""What each action of a schedule waits for.

A program says who gives what to whom (``Links``). A schedule adds, by its order, where each backward pass takes its
gradient
from: the estimate where ``S`` stands before the producer's ``B``, the target where ``T`` stands before it and ``S``
does not, both where the interface is locked and estimates too. From these follow the needs of every action.

Boundaries in time are numbered behind the others. Their ``S`` stands at a window's end, where the state that it leaves gets
its gradient; their ``T`` and ``M`` are of the state that it started from, which the window before left.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from dnifx.errors import ScheduleError
from dnifx.ir import Action, Boundary, Interface, Kind, Partition, Program, Recurrence, Schedule
from dnifx.schedules.language import unplaced


@dataclass(frozen=True)
class Gate:
    """What stands on a boundary, as far as order goes.

    Attributes:
        producer: Index of the partition that makes its values.
        consumers: Indices of the partitions that take them.
        locked: Whether the producer waits for the target.
        fits: Whether the estimator learns.
        imagines: Whether there is a synthetic input model, so that consumers need not wait for the producer.
        blends: Whether a locked interface gives its producer the estimate beside the target.
        needs_target: Whether the estimator learns from the target.
        needs_loss: Whether it learns from the loss.
        needs_error: Whether it answers from the error of the model's output.
        in_time: Whether it stands between a window and the next.
        teaches_core: Whether its fit, too, gives the partition gradients, so that it has to stand before the update.
    """

    producer: int
    consumers: frozenset[int]
    locked: bool
    fits: bool
    imagines: bool
    blends: bool = False
    needs_target: bool = True
    needs_loss: bool = False
    needs_error: bool = False
    in_time: bool = False
    teaches_core: bool = False

    @property
    def teaches_target(self) -> bool:
        """Whether the target has to be computed for the fit."""
        return self.fits and self.needs_target

    @property
    def needs_end(self) -> bool:
        """Whether it needs what the last partition gives."""
        return self.needs_loss or self.needs_error


@dataclass(frozen=True)
class Links:
    """Who gives what to whom in a program; indexed by partition, or by boundary for ``names`` and ``gates``.

    Attributes:
        names: Name of each boundary.
        gates: What stands on each boundary.
        sources: Partitions whose values it takes.
        direct: Those of its sources that give it a value which no synthetic input stands in for.
        produced: Boundaries that it produces, but for those in time.
        consumed: Boundaries that it consumes, but for those in time.
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
        """Index of the last partition, which gives output and loss."""
        return len(self.sources) - 1

    def imagines(self, partition: int) -> bool:
        """Whether a synthetic input stands in for some of the partition's inputs."""
        return any(self.gates[boundary].imagines for boundary in self.consumed[partition])

    def place(self, action: Action) -> int:
        """The partition where an action happens: that of its own number, or the producer of its boundary."""
        on_boundary = action.kind in (Kind.SYNTHESISE, Kind.TARGET, Kind.FIT)
        return self.gates[action.index].producer if on_boundary else action.index


class Answer(StrEnum):
    """Where a producer's backward pass takes the gradient of a boundary from."""

    ESTIMATE = "estimate"
    TARGET = "target"
    BOTH = "both"


def links(program: Program) -> Links:
    """Return who gives what to whom in a program; the same object for the same partitions, boundaries and interfaces.

    Raises:
        ScheduleError: A boundary has no interface.
    """
    interfaces = {interface.boundary: interface for interface in program.interfaces}
    bare = [boundary.name for boundary in program.boundaries if boundary.index not in interfaces]
    if bare:
        raise ScheduleError(f"No interface stands on {bare}, so no order can be given. Run the pass 'insert' first.")
    traits = tuple(_traits(interfaces[boundary.index]) for boundary in program.boundaries)
    return _links(program.partitions, program.boundaries, traits, tuple(map(_in_time, timed(program))))


def timed(program: Program) -> tuple[Recurrence, ...]:
    """Return the boundaries in time that a schedule names: all, or none where a window waits for the next."""
    known = tuple(each for each in program.recurrences if each.interface is not None)
    return () if any(each.interface.locked for each in known if each.interface is not None) else known


Moment = tuple[str, Gate]


def _in_time(each: Recurrence) -> Moment:
    fits = each.interface is not None and each.interface.fits
    core = fits and (each.cut.into_core or each.cut.auxiliary)
    gate = Gate(each.producer, frozenset(each.consumers), False, fits, False, in_time=True, teaches_core=core)
    return each.name, gate


Traits = tuple[bool, ...]
"""The fields of a gate after its producer and consumers."""


def _traits(interface: Interface) -> Traits:
    needed = interface.needs_target, interface.needs_loss, interface.needs_error
    return interface.locked, interface.fits, interface.input_model is not None, interface.blends, *needed


@lru_cache(maxsize=32)
def _links(
    partitions: tuple[Partition, ...],
    boundaries: tuple[Boundary, ...],
    traits: tuple[Traits, ...],
    moments: tuple[Moment, ...],
) -> Links:
    gates = tuple(
        Gate(boundary.producer, frozenset(boundary.consumers), *flags)
        for boundary, flags in zip(boundaries, traits, strict=True)
    )
    imagined = [flags[2] for flags in traits]
    return Links(
        names=(*(boundary.name for boundary in boundaries), *(name for name, _ in moments)),
        gates=(*gates, *(gate for _, gate in moments)),
        sources=tuple(_sources(each, partitions, boundaries, [False] * len(gates)) for each in partitions),
        direct=tuple(_sources(each, partitions, boundaries, imagined) for each in partitions),
        produced=tuple(tuple(b for b, gate in enumerate(gates) if gate.producer == k.index) for k in partitions),
        consumed=tuple(tuple(b for b, gate in enumerate(gates) if k.index in gate.consumers) for k in partitions),
        owns=tuple(bool(each.parameters) for each in partitions),
        owners=tuple(_sharing(_read(each), each, partitions, lambda other: other.parameters) for each in partitions),
        users=tuple(_sharing(each.parameters, each, partitions, _read) for each in partitions),
    )


def _sources(
    partition: Partition, partitions: tuple[Partition, ...], boundaries: tuple[Boundary, ...], imagined: list[bool]
) -> frozenset[int]:
    """Partitions that ``partition`` takes values from, apart from those of boundaries whose values are imagined."""
    consumed = [boundary for boundary in boundaries if partition.index in boundary.consumers]
    hidden = {value for boundary in consumed if imagined[boundary.index] for value in boundary.values}
    taken = set(partition.inputs) - hidden
    by_name = {
        other.index for other in partitions if other.index < partition.index and taken.intersection(other.outputs)
    }
    return frozenset(by_name | {boundary.producer for boundary in consumed if not imagined[boundary.index]})


def _read(partition: Partition) -> tuple[str, ...]:
    return (*partition.parameters, *partition.uses)


def _sharing(
    paths: Iterable[str],
    partition: Partition,
    partitions: tuple[Partition, ...],
    paths_of: Callable[[Partition], Iterable[str]],
) -> frozenset[int]:
    wanted = set(paths)
    return frozenset(other.index for other in partitions if wanted.intersection(paths_of(other)))


def answers(schedule: Schedule, program: Program) -> Mapping[int, Answer]:
    """Return, for each boundary whose producer runs backward, where that takes its gradient from.

    The estimate is used where ``S`` stands before the producer's ``B``, even if the target has arrived as well; the
    target is used where ``T`` stands before it and ``S`` does not; a locked interface that also estimates, as
    BP(lambda), uses both.
    """
    return answers_by_order(tuple(map(unplaced, schedule.actions)), links(program))


def answers_by_order(actions: tuple[Action, ...], wiring: Links) -> Mapping[int, Answer]:
    """Return what ``answers`` says, of unplaced actions."""
    position = {action: place for place, action in enumerate(actions)}
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
        return Answer.BOTH if (gate.fits or gate.blends) and estimated else Answer.TARGET
    return Answer.TARGET if arrived and not estimated else Answer.ESTIMATE


Sources = Mapping[int, Answer]
_Need = Callable[[int, Set[Action], Links, Sources], tuple[Action, ...]]


def needs(action: Action, actions: Set[Action], wiring: Links, answered: Sources) -> tuple[Action, ...]:
    """Return the actions that have to stand before ``action`` in a schedule that holds ``actions`` (all unplaced).

    Those that are not among ``actions`` are missing. ``answered`` is what ``answers`` says; a boundary that it leaves
    out takes the estimate, or the target where it is locked.
    """
    return _NEEDS[action.kind](action.index, actions, wiring, answered)


def _forward(index: int, actions: Set[Action], wiring: Links, _: Sources) -> tuple[Action, ...]:
    imagined = Action(Kind.INPUT, index)
    if imagined in actions:
        return (imagined, *_each(Kind.FORWARD, wiring.direct[index]))
    return _each(Kind.FORWARD, wiring.sources[index])


def _input(*_: object) -> tuple[Action, ...]:
    return ()


def _synthesise(index: int, actions: Set[Action], wiring: Links, answered: Sources) -> tuple[Action, ...]:
    producer = wiring.gates[index].producer
    backward = Action(Kind.BACKWARD, producer)
    late = answered.get(index) is Answer.TARGET and backward in actions and not wiring.gates[index].in_time
    error = (Action(Kind.FORWARD, wiring.last),) if wiring.gates[index].needs_error else ()
    return (Action(Kind.FORWARD, producer), *((backward,) if late else ()), *error)


def _backward(index: int, actions: Set[Action], wiring: Links, answered: Sources) -> tuple[Action, ...]:
    found = [Action(Kind.FORWARD, index)]
    for boundary, gate in enumerate(wiring.gates):
        if gate.in_time and gate.producer == index and named(boundary, actions):
            found.append(Action(Kind.SYNTHESISE, boundary))
    for boundary in wiring.produced[index]:
        gate = wiring.gates[boundary]
        answer = answered.get(boundary, _answer(gate, estimated=True, arrived=False))
        if answer is not Answer.TARGET:
            found.append(Action(Kind.SYNTHESISE, boundary))
        if answer is not Answer.ESTIMATE:
            found.append(Action(Kind.TARGET, boundary))
    return tuple(found)


def _target(index: int, _: Set[Action], wiring: Links, __: Sources) -> tuple[Action, ...]:
    return _each(Kind.BACKWARD, wiring.gates[index].consumers)


def _fit(index: int, actions: Set[Action], wiring: Links, _: Sources) -> tuple[Action, ...]:
    """The estimator is fitted from S and what it learns from, the input model from consumers' I and the producer's F.

    Either will do.
    """
    gate = wiring.gates[index]
    if gate.in_time:
        asked = Action(Kind.SYNTHESISE, index)
        return (Action(Kind.TARGET, index), *((asked,) if asked in actions else ()))
    estimator = (Action(Kind.SYNTHESISE, index), *_lessons(index, wiring)) if gate.fits else ()
    if not gate.imagines:
        return estimator
    inputs = _each(Kind.INPUT, gate.consumers)
    made = tuple(action for action in inputs if action in actions) or inputs
    model = (Action(Kind.FORWARD, gate.producer), *made)
    whole = [pair for pair in (estimator, model) if pair and actions >= frozenset(pair)]
    return tuple(action for pair in whole or (estimator, model) for action in pair)


def _lessons(index: int, wiring: Links) -> tuple[Action, ...]:
    """The actions that give what an estimator learns from."""
    gate = wiring.gates[index]
    target = (Action(Kind.TARGET, index),) if gate.needs_target else ()
    return (*target, Action(Kind.FORWARD, wiring.last)) if gate.needs_loss else target


def _update(index: int, actions: Set[Action], wiring: Links, _: Sources) -> tuple[Action, ...]:
    fits = (Action(Kind.FIT, boundary) for boundary, gate in enumerate(wiring.gates) if gate.teaches_core)
    return (*_each(Kind.BACKWARD, wiring.users[index]), *(fit for fit in fits if fit in actions))


def named(boundary: int, actions: Set[Action]) -> bool:
    """Whether any of some actions is of a boundary."""
    return any(Action(kind, boundary) in actions for kind in (Kind.SYNTHESISE, Kind.TARGET, Kind.FIT))


def _each(kind: Kind, indices: Iterable[int]) -> tuple[Action, ...]:
    return tuple(Action(kind, index) for index in sorted(indices))


_NEEDS: Mapping[Kind, _Need] = {
    Kind.FORWARD: _forward,
    Kind.INPUT: _input,
    Kind.SYNTHESISE: _synthesise,
    Kind.BACKWARD: _backward,
    Kind.TARGET: _target,
    Kind.FIT: _fit,
    Kind.UPDATE: _update,
}
