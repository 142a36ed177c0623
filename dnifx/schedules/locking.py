"""The three locks of backpropagation, and which of them a schedule leaves on each partition."""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Links, links, needs_in_order
from dnifx.schedules.language import unplaced


class Lock(StrEnum):
    """What a partition waits for (Jaderberg et al. 2017, section 1).

    ``FORWARD``: it cannot run forward before the partitions in front of it have. ``UPDATE``: it cannot be updated
    before the partitions behind it have run forward. ``BACKWARD``: it cannot be updated before the partitions behind
    it have run backward.
    """

    FORWARD = "forward"
    UPDATE = "update"
    BACKWARD = "backward"


def locks(schedule: Schedule, program: Program) -> tuple[frozenset[Lock], ...]:
    """Return the locks that a valid schedule leaves on each partition; on an idle one it leaves none.

    They follow from what the partition's actions need, not from the order of the schedule. The backward pass of an earlier
    step (``B0-4``) needs nothing of its own step.
    """
    wiring = links(program)
    before = _all_needs(schedule, wiring)
    behind = _descendants(wiring)
    return tuple(frozenset(_locks(index, before, behind[index])) for index in wiring.partitions)


def _locks(index: int, before: Mapping[Action, frozenset[Action]], behind: frozenset[int]) -> Iterable[Lock]:
    if any(need.kind is Kind.FORWARD for need in before.get(Action(Kind.FORWARD, index), ())):
        yield Lock.FORWARD
    last = next((each for kind in (Kind.UPDATE, Kind.BACKWARD) if (each := Action(kind, index)) in before), None)
    for kind, lock in (Kind.FORWARD, Lock.UPDATE), (Kind.BACKWARD, Lock.BACKWARD):
        if last is not None and any(need.kind is kind and need.index in behind for need in before[last]):
            yield lock


def _all_needs(schedule: Schedule, wiring: Links) -> dict[Action, frozenset[Action]]:
    """Everything each action needs, directly or through others. In a valid schedule, needs stand before the action."""
    found: dict[Action, frozenset[Action]] = {}
    delayed = {unplaced(action) for action in schedule.actions if action.kind is Kind.BACKWARD and action.lag}
    for action, needed in needs_in_order(schedule.actions, wiring).items():
        direct = () if action in delayed else needed
        found[action] = frozenset(direct).union(*(found[need] for need in direct))
    return found


def _descendants(wiring: Links) -> list[frozenset[int]]:
    """For each partition, those that take its values, directly or through others."""
    found: list[frozenset[int]] = [frozenset() for _ in wiring.partitions]
    for index in reversed(wiring.partitions):
        for source in wiring.sources[index]:
            found[source] |= {index} | found[index]
    return found
