"""Which of the three locks of backpropagation a schedule leaves on each partition."""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Links, answers_by_order, links, needs
from dnifx.schedules.language import unplaced


class Lock(StrEnum):
    """What a partition waits for (Jaderberg et al. 2017, section 1).

    ``FORWARD``: it cannot process its input before the partitions in front of it have run forward. ``UPDATE``: it
    cannot be updated before the partitions behind it have run forward. ``BACKWARD``: nor before they have run
    backward.
    """

    FORWARD = "forward"
    UPDATE = "update"
    BACKWARD = "backward"


def locks(schedule: Schedule, program: Program) -> tuple[frozenset[Lock], ...]:
    """Return the locks that remain on each partition: by what its actions depend on, not by the order they stand in.

    Args:
        schedule: A valid schedule of the program.
        program: The program.

    Returns:
        One set for each partition, in order; a partition that is idle in this step has none.
    """
    wiring = links(program)
    before = _all_needs(schedule, wiring)
    behind = _descendants(wiring)
    return tuple(frozenset(_locks(index, before, behind[index])) for index in wiring.partitions)


def _locks(index: int, before: Mapping[Action, frozenset[Action]], behind: frozenset[int]) -> Iterable[Lock]:
    if any(need.kind is Kind.FORWARD for need in before.get(Action(Kind.FORWARD, index), ())):
        yield Lock.FORWARD
    last = next((each for kind in (Kind.UPDATE, Kind.BACKWARD) if (each := Action(kind, index)) in before), None)
    if last is not None:
        kinds = {
            need.kind for need in before[last] if need.kind in (Kind.FORWARD, Kind.BACKWARD) and need.index in behind
        }
        if Kind.FORWARD in kinds:
            yield Lock.UPDATE
        if Kind.BACKWARD in kinds:
            yield Lock.BACKWARD


def _all_needs(schedule: Schedule, wiring: Links) -> dict[Action, frozenset[Action]]:
    """Everything each action needs, directly or not; in a valid schedule that has been seen when the action comes."""
    bare = tuple(map(unplaced, schedule.actions))
    present, answered = frozenset(bare), answers_by_order(bare, wiring)
    found: dict[Action, frozenset[Action]] = {}
    for action in bare:
        direct = needs(action, present, wiring, answered)
        found[action] = frozenset(direct).union(*(found[need] for need in direct))
    return found


def _descendants(wiring: Links) -> list[frozenset[int]]:
    """The partitions behind each partition: those that take its values, directly or through others."""
    found: list[frozenset[int]] = [frozenset() for _ in wiring.partitions]
    for index in reversed(wiring.partitions):
        for source in wiring.sources[index]:
            found[source] |= {index} | found[index]
    return found
