"""Joined updates: after which actions of a step the updates that wait are made.

An update waits as long as nothing reads what it writes: partitions their parameters, estimators theirs, the loss whatever the
user's function looks at. So a step calls few optimizers, each with the parameters of several partitions, and gives the same numbers.
"""

from collections.abc import Sequence

from dnifx.ir import SENDS, TRANSFERS, Action, Kind, Program
from dnifx.schedules.language import unplaced

UPDATES = frozenset({Kind.UPDATE, Kind.FIT})
RECEIVES = TRANSFERS - SENDS
"""Actions that wait for another rank: updates are made before, not after."""


def can_wait(program: Program) -> bool:
    """Whether the updates of a program may wait. In time, and where true gradients come late, earlier steps read weights too."""
    late = any(each.late for each in program.interfaces)
    return not (program.recurrences or program.carries or program.parts or late)


def made_after(actions: Sequence[Action], program: Program) -> frozenset[int]:
    """Return the places of the actions after which all updates that wait are made; none where no two meet."""
    waiting: list[Action] = []
    places, last = set[int](), -1
    for place, action in enumerate(actions):
        elsewhere = action.rank != actions[last].rank
        if waiting and (elsewhere or any(reads(unplaced(action), each, program) for each in waiting)):
            places.add(last)
            waiting = []
        if action.kind in UPDATES:
            waiting.append(unplaced(action))
            last = place
    return frozenset({*places, last} if waiting else places)


def reads(action: Action, update: Action, program: Program) -> bool:
    """Whether an action may read what an update writes."""
    if action.kind in RECEIVES:
        return True
    if action.kind is Kind.SEND_WEIGHTS:
        return update == Action(Kind.UPDATE, action.index)
    if action.kind is Kind.SEND_COPIES:
        written = program.partitions[update.index].parameters if update.kind is Kind.UPDATE else ()
        return not set(program.interfaces[action.index].mirrors).isdisjoint(written)
    if action.kind in (Kind.SYNTHESISE, Kind.FIT):
        suffix = bool(program.interfaces[action.index].suffix)
        return suffix or (update.kind is Kind.FIT and update.index == action.index)
    if action.kind is Kind.INPUT:
        return update.kind is Kind.FIT and action.index in program.boundaries[update.index].consumers
    if action.kind in (Kind.FORWARD, Kind.BACKWARD):
        written = program.partitions[update.index].parameters if update.kind is Kind.UPDATE else ()
        calls_loss = action == Action(Kind.FORWARD, len(program.partitions) - 1)
        return calls_loss or not set(program.partitions[action.index].uses).isdisjoint(written)
    return False
