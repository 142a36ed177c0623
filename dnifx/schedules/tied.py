"""Tied parameters that other partitions read some steps late, so that no place waits for the one that updates them.

``F0-4`` reads what other partitions update as it was 4 steps ago. ``U1-4`` is an update that those partitions read 4 steps later,
and ``R1-4`` is where they begin to: over ranks, the new values are received there. A gradient goes to the partition that updates the
parameter within its step, as the values of the step do.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from dnifx.errors import ScheduleError
from dnifx.ir import READS_TIED, Action, Kind, Program, Schedule
from dnifx.schedules.dependencies import Links, links

Fault = tuple[int, str]
"""The position of a wrong action, and what is wrong with it."""


def readers(wiring: Links) -> frozenset[int]:
    """Return the partitions that read a trainable parameter which another one updates."""
    return frozenset(index for index in wiring.partitions if wiring.owners[index] - {index})


def read_elsewhere(wiring: Links) -> frozenset[int]:
    """Return the partitions that update a parameter which another one reads too."""
    return frozenset(index for index in wiring.partitions if wiring.users[index] - {index})


def tied_lag(program: Program, lag: int, given: int | None = None) -> int:
    """Return how many steps late tied parameters are read: as many as were given, or the lag of targets.

    By default nothing is read late where one of the partitions waits for a true gradient in every step anyway, and where there are
    rates or cuts in time, which run in one place.

    Args:
        program: The program.
        lag: Steps that targets are late.
        given: What a user gave.

    Raises:
        ScheduleError: What was given is no number of steps, or does not go with the program.
    """
    wiring = links(program)
    late = readers(wiring)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise ScheduleError(f"tied_lag={given!r} is not a number of steps; give 0 or more, or None for that of lag=")
    together = bool(program.parts or program.carries or program.recurrences)
    if given and late and together:
        raise ScheduleError(
            f"tied_lag={given} does not go with rates or cuts in time, which run in one place. Leave tied_lag= out"
        )
    if not late or together:
        return 0
    if given is not None:
        return given
    waits = any(wiring.gates[boundary].locked for index in late for boundary in wiring.produced[index])
    return 0 if waits else lag


def read_late(schedule: Schedule, before: Schedule, program: Program, lag: int) -> Schedule:
    """Return a schedule in which partitions read tied parameters ``lag`` steps late.

    Args:
        schedule: What a step runs.
        before: What ran ``lag`` steps ago: its updates reach the other partitions.
        program: The program.
        lag: Number of steps.
    """
    return _read_late(schedule, before, links(program), lag) if lag else schedule


@lru_cache(maxsize=256)
def _read_late(schedule: Schedule, before: Schedule, wiring: Links, lag: int) -> Schedule:
    late = {Kind.FORWARD: readers(wiring), Kind.UPDATE: read_elsewhere(wiring)}
    actions = [
        replace(action, lag=lag) if action.index in late.get(action.kind, ()) else action for action in schedule.actions
    ]
    made = sorted(action.index for action in before.actions if action.kind is Kind.UPDATE)
    actions += [Action(Kind.RENEW, index, lag=lag) for index in made if index in late[Kind.UPDATE]]
    return replace(schedule, actions=tuple(actions))


def tied_faults(schedule: Schedule, wiring: Links) -> Iterator[Fault]:
    """Wrong lags of tied parameters in a schedule that is valid without them."""
    marked = [(place, action) for place, action in enumerate(schedule.actions) if action.kind in READS_TIED]
    shares = {Kind.FORWARD: readers(wiring), Kind.UPDATE: read_elsewhere(wiring), Kind.RENEW: read_elsewhere(wiring)}
    renewed = set[int]()
    for place, action in marked:
        if action.index not in shares[action.kind] and (action.lag or action.kind is Kind.RENEW):
            reads = action.kind is Kind.FORWARD
            what = (
                "reads no parameter that another one updates"
                if reads
                else "updates no parameter that another one reads"
            )
            remedy = "it" if action.kind is Kind.RENEW else f"-{action.lag}"
            yield place, f"partition {action.index} {what}. Remove {remedy}."
        elif action.kind is Kind.RENEW and not action.lag:
            yield place, f"it needs a lag: R{action.index}-4 is what the update of 4 steps ago made. Add one."
        elif action.kind is Kind.RENEW and action.index in renewed:
            yield place, "it stands twice; a step runs it once. Remove one."
        renewed |= {action.index} if action.kind is Kind.RENEW else set()
    for place, action in marked:
        if action.index in shares[action.kind] and action.lag != schedule.tied_lag:
            yield (
                place,
                f"its lag is {action.lag}, and others read tied parameters {schedule.tied_lag} steps late. Give all of them one lag.",
            )
