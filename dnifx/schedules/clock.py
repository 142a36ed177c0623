"""The clock of a simulation: it issues the actions of one step after another, each as soon as it can begin."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from dnifx.ir import RECEIVED, SENDS, TRANSFERS, Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Links, links
from dnifx.schedules.drawing import device_of, needs_over_ranks
from dnifx.schedules.language import unplaced
from dnifx.schedules.transfers import Ranks, copied_parameters, moved_parameters, ranks_of

COPIES = frozenset({Kind.SEND_COPIES, Kind.RECEIVE_COPIES})
"""What moves the parameters that an estimator copies: not in every step."""


@dataclass(frozen=True)
class Link:
    """The link between any two ranks.

    Attributes:
        latency: Seconds from the sending of the first byte to its arrival.
        bandwidth: Bytes a second that one rank sends, to all others together.
        handling: Seconds for which a rank itself is busy with each byte that it sends or receives.
    """

    latency: float = 0.0
    bandwidth: float = inf
    handling: float = 0.0


@dataclass(frozen=True)
class Span:
    """One action in time.

    Attributes:
        action: The action, as the schedule writes it.
        step: Number of the training step it belongs to.
        partition: The partition where it runs.
        device: The device that it runs on.
        stream: The stream that it runs on.
        ready: When all that it needs has ended.
        free: When the action before it on its stream has ended.
        end: When it ends.
        cause: Index of the span that it begins right after; None where nothing holds it up.
    """

    action: Action
    step: int
    partition: int
    device: str
    stream: int
    ready: float
    free: float
    end: float
    cause: int | None

    @property
    def start(self) -> float:
        """When it begins: as soon as it is ready and its stream is free."""
        return max(self.ready, self.free)


@dataclass(frozen=True)
class Turn:
    """One action of a window, with all that does not change from step to step. Actions are numbers, the same in all windows.

    Attributes:
        action: The action, as the schedule writes it.
        number: The action without its place and lag.
        partition: The partition where it runs.
        resource: Its device and stream.
        before: What it needs of the step before.
        needed: What it needs of its own step.
        late: What it needs of the step ``action.lag`` before; None where it needs nothing.
        cost: How long it takes.
        bytes: What it sends or receives, in bytes.
        every: After how many steps it runs again.
    """

    action: Action
    number: int
    partition: int
    resource: tuple[str, int]
    before: tuple[int, ...]
    needed: tuple[int, ...]
    late: int | None
    cost: float
    bytes: int
    every: int = 1


class Numbers(dict[Action, int]):
    """A number for each action."""

    def __missing__(self, action: Action) -> int:
        self[action] = len(self)
        return self[action]


def turns_of(
    schedule: Schedule, program: Program, costs: Mapping[Action, float], link: Link, numbers: Numbers
) -> list[Turn]:
    """Return the actions of a window with all that does not change from step to step."""
    wiring, sizes, ranks = links(program), value_bytes(program), ranks_of(schedule, program) or ()
    needed, turns = needs_over_ranks(schedule, program, wiring), []
    for action in schedule.actions:
        bare, size, late = (
            unplaced(action),
            moved_bytes(action, program, sizes, ranks, schedule.tied_lag > 0),
            _late_need(action),
        )
        turn = Turn(
            action,
            numbers[bare],
            wiring.place(bare),
            (device_of(action, program, wiring), action.stream or 0),
            tuple(numbers[need] for need in _needs_of_last_step(action, wiring, ranks)),
            tuple(numbers[need] for need in needed[bare]),
            None if late is None else numbers[late],
            costs.get(bare, 0.0) + size * link.handling,
            size,
            wiring.gates[action.index].refresh if action.kind in COPIES else 1,
        )
        turns.append(turn)
    return turns


@dataclass
class Clock:
    """Issues the actions of one step after another."""

    link: Link
    spans: list[Span] = field(default_factory=list)
    _last: dict[int, int] = field(default_factory=dict)
    _done: dict[tuple[int, int], int] = field(default_factory=dict)
    _busy: dict[int | None, float] = field(default_factory=dict)
    _arrived: dict[int, float] = field(default_factory=dict)
    _streams: dict[tuple[str, int], int] = field(default_factory=dict)

    def run(self, step: int, turns: Iterable[Turn]) -> None:
        """Issue one step."""
        before = dict(self._last)
        for turn in turns:
            if step % turn.every:
                continue
            action = turn.action
            earlier = [before[need] for need in turn.before if need in before]
            earlier += [self._last[need] for need in turn.needed]
            if turn.late is not None and (step - action.lag, turn.late) in self._done:
                earlier.append(self._done[step - action.lag, turn.late])
            receives = action.kind in TRANSFERS - SENDS
            latest, previous = max(earlier, key=self._end, default=None), self._streams.get(turn.resource)
            ready, free = (
                self._arrived.get(latest, 0.0) if receives and latest is not None else self._end(latest),
                self._end(previous),
            )
            cause = latest if ready > free else previous
            end = max(ready, free) + turn.cost
            self._last[turn.number] = self._streams[turn.resource] = self._done[step, turn.number] = len(self.spans)
            self.spans.append(Span(action, step, turn.partition, *turn.resource, ready, free, end, cause))
            if action.kind in SENDS:
                self._send(action, turn.bytes, end)

    def _send(self, action: Action, size: int, start: float) -> None:
        """Let what was sent last travel; a rank sends one message after the other, to whichever rank it goes."""
        sender = action.rank
        self._busy[sender] = max(start, self._busy.get(sender, 0.0)) + size / self.link.bandwidth
        self._arrived[len(self.spans) - 1] = self._busy[sender] + self.link.latency

    def _end(self, place: int | None) -> float:
        return 0.0 if place is None else self.spans[place].end


def _late_need(action: Action) -> Action | None:
    """What an action with a lag needs of an earlier step."""
    if action.lag and action.kind in (Kind.RECEIVE_TARGET, Kind.RECEIVE_WEIGHTS):
        return Action(RECEIVED[action.kind], action.index, rank=action.peer, peer=action.rank)
    if action.kind is Kind.RENEW:
        return Action(Kind.UPDATE, action.index)
    return Action(Kind.TARGET, action.index) if action.lag and action.kind is Kind.FIT else None


def value_bytes(program: Program) -> dict[str, int]:
    """Return the size of every value that may cross a cut, by its name."""
    specs = {
        name: spec.bytes for each in program.boundaries for name, spec in zip(each.values, each.specs, strict=True)
    }
    return {**specs, **{name: measure.bytes for name, measure in program.measures.items()}}


def moved_bytes(
    action: Action, program: Program, sizes: Mapping[str, int], ranks: Ranks = (), late: bool = False
) -> int:
    """Return the size of what a transfer moves: values, the gradients of a boundary, parameters or their gradients; else 0.

    ``sizes`` are those of ``value_bytes``, ``ranks`` those of the partitions, and tied parameters may be read ``late``.
    """
    if action.kind not in TRANSFERS:
        return 0
    if action.kind in (Kind.SEND_TARGET, Kind.RECEIVE_TARGET):
        return sum(spec.bytes for spec in program.boundaries[action.index].specs)
    if action.kind not in (Kind.SEND_VALUES, Kind.RECEIVE_VALUES):
        known = dict(program.model.named_parameters())
        if action.kind in COPIES:
            moved = copied_parameters(action, links(program), program.partitions, ranks, late)
        else:
            moved = moved_parameters(action, program.partitions, ranks)
        names = [name for name in moved if name in known]
        return sum(known[name].numel() * known[name].element_size() for name in names)
    return sum(sizes.get(name, 0) for name in program.partitions[action.index].outputs)


def _needs_of_last_step(action: Action, wiring: Links, ranks: Ranks) -> Iterable[Action]:
    if action.kind is Kind.FORWARD:
        owners = wiring.owners[action.index]
        late = owners - {action.index} if action.lag else frozenset[int]()
        now = (Action(Kind.UPDATE, owner) for owner in owners - late)
        return *now, *(_renewal(owner, action, ranks) for owner in late)
    if action.kind is Kind.SYNTHESISE:
        return (Action(Kind.FIT, action.index),)
    if action.kind is Kind.SEND_COPIES:
        return tuple(Action(Kind.UPDATE, owner) for owner, _ in wiring.gates[action.index].copies)
    if action.kind is Kind.INPUT:
        return tuple(Action(Kind.FIT, boundary) for boundary in wiring.consumed[action.index])
    return ()


def _renewal(owner: int, reader: Action, ranks: Ranks) -> Action:
    """Where a forward pass gets what it reads late: it is received, or it is here."""
    if not ranks or ranks[owner] == reader.rank:
        return Action(Kind.RENEW, owner)
    return Action(Kind.RECEIVE_WEIGHTS, owner, rank=reader.rank, peer=ranks[owner])
