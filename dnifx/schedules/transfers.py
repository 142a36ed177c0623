"""Schedules over ranks: which rank an action runs on, and the sends and receives between ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain

from dnifx.errors import ScheduleError
from dnifx.ir import RECEIVED, SENDS, TRANSFERS, Action, Kind, Partition, Program, Schedule
from dnifx.schedules.dependencies import Links, links
from dnifx.schedules.language import described, unplaced

Ranks = tuple[int, ...]
"""The rank of each partition."""

MADE_BY = {
    Kind.SEND_VALUES: Kind.FORWARD,
    Kind.SEND_GRADIENTS: Kind.BACKWARD,
    Kind.SEND_WEIGHTS: Kind.UPDATE,
}
"""The action of the same partition that makes what is sent."""


def transferred(schedule: Schedule, program: Program, ranks: Ranks) -> Schedule:
    """Return a schedule with the rank of every action, and with sends and receives where values cross from rank to rank.

    Values are sent as soon as they are made and received just before their first use. A target is sent as soon as all its
    consumers on a rank have run backward. It is received where the target is taken, or, where it has a lag, before the fit.
    What a backward pass gives to parameters of another rank is sent after it, and received before their update. Their new values
    are sent after the update and received there, or, where they are read late, so many steps later. What an estimator copies of
    parameters of other ranks is sent and received before it is asked. Everything else keeps its order. A schedule that has
    transfers keeps them.

    Raises:
        ScheduleError: The number of ranks is not that of the partitions, or the schedule names other ranks.
    """
    if len(ranks) != len(program.partitions):
        raise ScheduleError(
            f"{len(ranks)} ranks were given for {len(program.partitions)} partitions; give one for each."
        )
    own = ranks_of(schedule, program)
    if own is not None and own != ranks:
        raise ScheduleError(
            f"The schedule {schedule.name!r} runs partitions on the ranks {own}, but {ranks} were given."
        )
    if any(action.kind in TRANSFERS for action in schedule.actions):
        return schedule
    return _transferred(schedule, program.partitions, ranks, links(program))


@lru_cache(maxsize=256)
def _transferred(schedule: Schedule, partitions: tuple[Partition, ...], ranks: Ranks, wiring: Links) -> Schedule:
    at = _Ranked(schedule.actions, partitions, ranks, wiring, schedule.tied_lag > 0)
    order: list[Action] = []
    received = set[Action]()
    for action in schedule.actions:
        placed = replace(action, rank=at.rank(action))
        receives = [each for each in at.received_before(placed) if each not in received]
        received.update(receives)
        order += [*at.sent_before(placed), *receives, placed, *at.moved_after(placed)]
    return replace(schedule, actions=tuple(order))


def ranks_of(schedule: Schedule, program: Program) -> Ranks | None:
    """Return the rank of each partition that the actions name; None where they name no rank.

    Raises:
        ScheduleError: Actions of a partition name several ranks, or some name none.
    """
    wiring, found = links(program), dict[int, int | None]()
    for action in schedule.actions:
        if action.kind not in TRANSFERS:
            rank = found.setdefault(wiring.place(action), action.rank)
            if rank != action.rank:
                raise ScheduleError(
                    f"{action} runs on another rank than the actions before it of partition {wiring.place(action)}. Let all actions of a "
                    "partition, and of the boundaries that it produces, name the same rank."
                )
    known = [rank for rank in found.values() if rank is not None]
    if not known:
        return None
    if len(known) < len(program.partitions):
        missing = [each.name for each in program.partitions if found.get(each.index) is None]
        raise ScheduleError(
            f"Some actions name a rank, but those of {', '.join(missing)} name none. Give every action its rank."
        )
    return tuple(known[list(found).index(index)] for index in wiring.partitions)


class _Ranked:
    """What crosses from rank to rank in one step."""

    def __init__(
        self, actions: Sequence[Action], partitions: Sequence[Partition], ranks: Ranks, wiring: Links, late: bool
    ) -> None:
        self.partitions, self.ranks, self.wiring = partitions, ranks, wiring
        self.late = late
        self.actions = frozenset(map(unplaced, actions))
        order = [action.index for action in actions if action.kind is Kind.BACKWARD]
        self.backward = {index: place for place, index in enumerate(order)}
        self.users: dict[int, list[int]] = {}
        for user in wiring.partitions:
            for source in wiring.sources[user]:
                self.users.setdefault(source, []).append(user)

    def rank(self, action: Action) -> int:
        """The rank where an action that is no transfer runs."""
        return self.ranks[self.wiring.place(action)]

    def takers(self, source: int) -> list[int]:
        """The other ranks where a partition that runs takes the values of ``source``."""
        users = self.users.get(source, ())
        found = {self.ranks[user] for user in users if Action(Kind.FORWARD, user) in self.actions}
        return sorted(found - {self.ranks[source]})

    def senders(self, boundary: int) -> list[int]:
        """The other ranks that send the gradients of a boundary, in the order of their first backward pass."""
        gate, own = self.wiring.gates[boundary], self.ranks[self.wiring.gates[boundary].producer]
        order = sorted(gate.consumers, key=lambda index: (self.backward.get(index, len(self.backward)), index))
        return [rank for rank in dict.fromkeys(self.ranks[index] for index in order) if rank != own]

    def received_before(self, action: Action) -> Iterator[Action]:
        """The receives that have to stand before an action."""
        here = action.rank
        if action.kind is Kind.FORWARD:
            for source in sorted(self.wiring.sources[action.index]):
                receive = Action(Kind.RECEIVE_VALUES, source, rank=here, peer=self.ranks[source])
                if receive.peer != here:
                    yield receive
        if action.kind is Kind.UPDATE:
            users = sorted(user for user in self.wiring.users[action.index] if self.ranks[user] != here)
            for user in (each for each in users if Action(Kind.BACKWARD, each) in self.actions):
                yield Action(Kind.RECEIVE_GRADIENTS, user, rank=here, peer=self.ranks[user])
        if action.kind is Kind.SYNTHESISE:
            for send in self.sent_before(action):
                yield Action(Kind.RECEIVE_COPIES, action.index, rank=here, peer=send.rank)
        if action.kind is self.takes(action):
            for sender in self.senders(action.index):
                yield Action(Kind.RECEIVE_TARGET, action.index, rank=here, lag=action.lag, peer=sender)

    def sent_before(self, action: Action) -> Iterator[Action]:
        """The sends of what an estimator copies, before it is asked."""
        if action.kind is Kind.SYNTHESISE:
            owners = {self.ranks[owner] for owner, _ in self.wiring.gates[action.index].copies} - {action.rank}
            for rank in sorted(owners):
                send = Action(Kind.SEND_COPIES, action.index, rank=rank, peer=action.rank)
                if copied_parameters(send, self.wiring, self.partitions, self.ranks, self.late):
                    yield send

    def takes(self, action: Action) -> Kind | None:
        """The action before which the target of a boundary is received: its fit where that is late, else the target itself."""
        if action.kind not in (Kind.TARGET, Kind.FIT):
            return None
        return Kind.FIT if action.lag and not self.wiring.gates[action.index].late else Kind.TARGET

    def readers(self, action: Action) -> list[int]:
        """The other ranks where a partition reads what the partition of an action updates."""
        return sorted({self.ranks[user] for user in self.wiring.users[action.index]} - {action.rank})

    def moved_after(self, action: Action) -> Iterator[Action]:
        """The sends that can follow an action, and the receives of new weights, which are everywhere when the step goes on."""
        if action.kind is Kind.FORWARD:
            for taker in self.takers(action.index):
                yield Action(Kind.SEND_VALUES, action.index, rank=action.rank, peer=taker)
        if action.kind is Kind.UPDATE:
            for taker in self.readers(action):
                yield Action(Kind.SEND_WEIGHTS, action.index, rank=action.rank, peer=taker)
                if not action.lag:
                    yield Action(Kind.RECEIVE_WEIGHTS, action.index, rank=taker, peer=action.rank)
        if action.kind is Kind.RENEW:
            for taker in self.readers(action):
                yield Action(Kind.RECEIVE_WEIGHTS, action.index, rank=taker, lag=action.lag, peer=action.rank)
        if action.kind is Kind.BACKWARD:
            updated = [each for each in self.wiring.owners[action.index] if Action(Kind.UPDATE, each) in self.actions]
            for owner in sorted({self.ranks[each] for each in updated} - {action.rank}):
                yield Action(Kind.SEND_GRADIENTS, action.index, rank=action.rank, peer=owner)
            for boundary in self.wiring.consumed[action.index]:
                gate = self.wiring.gates[boundary]
                here = [each for each in gate.consumers if each in self.backward and self.ranks[each] == action.rank]
                away = self.ranks[gate.producer] != action.rank
                if (
                    away
                    and max(here, key=self.backward.__getitem__) == action.index
                    and Action(Kind.TARGET, boundary) in self.actions
                ):
                    yield Action(Kind.SEND_TARGET, boundary, rank=action.rank, peer=self.ranks[gate.producer])


def evaluation(program: Program, ranks: Ranks) -> Schedule:
    """Return the schedule of a forward pass. Present values of tied parameters are brought to all ranks where partitions read them."""
    wiring = links(program)
    at = _Ranked((), program.partitions, ranks, wiring, late=False)
    brought = (at.moved_after(Action(Kind.UPDATE, owner, rank=ranks[owner])) for owner in wiring.partitions)
    forward = Schedule("evaluation", tuple(Action(Kind.FORWARD, index) for index in wiring.partitions))
    return replace(forward, actions=(*chain.from_iterable(brought), *transferred(forward, program, ranks).actions))


def moved_parameters(action: Action, partitions: Sequence[Partition], ranks: Ranks) -> tuple[str, ...]:
    """Return the shared parameters whose gradients (``SEND_B``, ``RECV_B``) or new values (``SEND_U``, ``RECV_U``) a transfer moves."""
    own = partitions[action.index]
    other = action.peer if action.kind in SENDS else action.rank
    there = [each for each in partitions if ranks[each.index] == other]
    if action.kind in (Kind.SEND_GRADIENTS, Kind.RECEIVE_GRADIENTS):
        owned = {name for each in there for name in each.parameters}
        return tuple(name for name in own.uses if name in owned)
    used = {name for each in there for name in each.uses}
    return tuple(name for name in own.parameters if name in used)


def copied_parameters(
    action: Action, wiring: Links, partitions: Sequence[Partition], ranks: Ranks, late: bool = False
) -> tuple[str, ...]:
    """Return the parameters that a transfer of copies (``SEND_S``, ``RECV_S``) moves: those that no partition on the taker's rank uses.

    Where tied parameters are read ``late``, partitions there have no present values, so that these are moved too.
    """
    source, taker = (action.rank, action.peer) if action.kind is Kind.SEND_COPIES else (action.peer, action.rank)
    there = {name for each in partitions if ranks[each.index] == taker and not late for name in each.uses}
    copies = wiring.gates[action.index].copies if action.index < len(wiring.gates) else ()
    return tuple(name for owner, names in copies if ranks[owner] == source for name in names if name not in there)


def transfer_needs(schedule: Schedule, program: Program) -> dict[Action, tuple[Action, ...]]:
    """Return what actions need in their step because of transfers, without places; nothing where there are no transfers."""
    ranks = ranks_of(schedule, program)
    if ranks is None or not any(action.kind in TRANSFERS for action in schedule.actions):
        return {}
    core = tuple(action for action in schedule.actions if action.kind not in TRANSFERS)
    wiring = links(program)
    at = _Ranked(core, program.partitions, ranks, wiring, schedule.tied_lag > 0)
    found: dict[Action, tuple[Action, ...]] = {}
    position = {unplaced(action): place for place, action in enumerate(core)}
    for action in schedule.actions:
        if action.kind not in TRANSFERS:
            received = tuple(map(unplaced, at.received_before(replace(action, rank=at.rank(action)))))
            if received:
                found[unplaced(action)] = received
        elif action.kind in MADE_BY:
            found[unplaced(action)] = (Action(MADE_BY[action.kind], action.index),)
        elif action.kind is Kind.SEND_TARGET:
            users = wiring.gates[action.index].consumers if action.index < len(wiring.gates) else frozenset()
            here = sorted(user for user in users if ranks[user] == action.rank)
            found[unplaced(action)] = tuple(Action(Kind.BACKWARD, user) for user in here)
        elif action.kind is Kind.SEND_COPIES:
            copies = wiring.gates[action.index].copies if action.index < len(wiring.gates) else ()
            asked = position.get(Action(Kind.SYNTHESISE, action.index), -1)
            updates = (Action(Kind.UPDATE, owner) for owner, _ in copies if ranks[owner] == action.rank)
            found[unplaced(action)] = tuple(each for each in updates if position.get(each, asked) < asked)
        elif not action.lag:
            send = Action(RECEIVED[action.kind], action.index, rank=action.peer, peer=action.rank)
            found[unplaced(action)] = (send,)
    return found


def transfer_faults(schedule: Schedule, program: Program) -> Iterator[tuple[int, str]]:
    """Wrong ranks and transfers of a schedule that is valid without them: the position, and what is wrong.

    Raises:
        ScheduleError: Actions of a partition name several ranks, or some name none.
    """
    ranks, names = ranks_of(schedule, program), links(program).names
    given = [action for action in schedule.actions if action.kind in TRANSFERS]
    if not given:
        return
    core = replace(schedule, actions=tuple(action for action in schedule.actions if action.kind not in TRANSFERS))
    whole = () if ranks is None else transferred(core, program, ranks).actions
    wanted = {replace(action, device=None, stream=None) for action in whole if action.kind in TRANSFERS}
    needed, done = transfer_needs(schedule, program), set[Action]()
    for place, action in enumerate(schedule.actions):
        bare = unplaced(action)
        if action.kind in TRANSFERS and replace(action, device=None, stream=None) not in wanted:
            yield place, "nothing crosses from rank to rank there. Remove it."
        if action.kind in TRANSFERS and bare in done:
            yield place, "it stands twice; a step runs it once. Remove one."
        for need in needed.get(bare, ()):
            if need not in done:
                yield place, f"it needs {described(need, names)} before it: add {need} there, or move it."
        done.add(bare)
    ends = SENDS | {Kind.RECEIVE_WEIGHTS}  # other receives are missed by what stands after them
    for missing in sorted((each for each in wanted if unplaced(each) not in done and each.kind in ends), key=str):
        yield (
            len(schedule.actions) - 1,
            f"{missing} is missing after it. Add it, or leave all transfers out: they are put in.",
        )
