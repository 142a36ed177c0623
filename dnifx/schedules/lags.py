"""Lags: targets that are used some steps late, and tied parameters that are read so, so that no partition waits for them.

The lag is fixed, so a run gives the same numbers on one process and on many, however fast the links between them are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from dnifx.errors import ScheduleError
from dnifx.ir import Action, Kind, Period, Program, Schedule
from dnifx.schedules.dependencies import Answer, Gate, Links, answers_by_order, links
from dnifx.schedules.language import unplaced
from dnifx.schedules.sources import Resumable, ScheduleSource, Sequential, at_least
from dnifx.schedules.tied import read_late, tied_lag

Fault = tuple[int, str]
"""The position of a wrong action, and what is wrong with it."""


def lagged(
    schedule: Schedule,
    program: Program,
    lag: int,
    before: Schedule | None = None,
    tied: int | None = None,
    updated: Schedule | None = None,
) -> Schedule:
    """Return a schedule whose estimators are fitted to the targets of ``lag`` steps ago, and whose tied parameters are read late.

    A boundary whose producer waits for the target in this step keeps its own fit: the target is there.

    Args:
        schedule: What a step runs without a lag.
        program: The program.
        lag: Number of steps.
        before: What ran ``lag`` steps ago, where that is another schedule: its targets are those that are used.
        tied: Steps after which the other partitions read what an update makes of a tied parameter; as ``tied_lag`` says by default.
        updated: What ran ``tied`` steps ago, where that is another schedule.

    Raises:
        ScheduleError: A boundary cannot be fitted late; the text says why.
    """
    wiring = links(program)
    at_least(0, lag=lag)
    refuse_lag(wiring, program, lag)
    late = _lagged(schedule, schedule if before is None else before, lag, wiring) if lag else schedule
    return read_late(late, schedule if updated is None else updated, program, tied_lag(program, lag, tied))


@lru_cache(maxsize=256)
def _lagged(schedule: Schedule, before: Schedule, lag: int, wiring: Links) -> Schedule:
    kept, due = _fitted_late(schedule, wiring), _fitted_late(before, wiring)
    own = {action.index for action in schedule.actions if action.kind is Kind.FIT}
    order = []
    for action in schedule.actions:
        fits = action.kind is Kind.FIT and action.index in kept
        if not (fits and action.index not in due):
            late = fits or (action.kind is Kind.TARGET and action.index in kept)
            order.append(replace(action, lag=lag) if late else action)
    return replace(schedule, actions=(*order, *(Action(Kind.FIT, index, lag=lag) for index in sorted(due - own))))


def latest(first: Schedule | Period, program: Program, lag: int, tied: int | None = None) -> tuple[int, int]:
    """Return how many steps late anything is at most, and tied parameters, by both lags or as the first step says itself."""
    read = max([tied_lag(program, lag, tied), *(each.tied_lag for each in first.windows)])
    written = (action.lag for each in first.windows for action in each.actions)
    return max([lag, read, *(each.late for each in program.interfaces), *written]), read


def _fitted_late(schedule: Schedule, wiring: Links) -> frozenset[int]:
    """The boundaries whose target a schedule uses for a fit alone."""
    present = frozenset(map(unplaced, schedule.actions))
    answered = answers_by_order(schedule.actions, wiring)
    return frozenset(
        index
        for index, gate in enumerate(wiring.gates)
        if gate.fits and gate.needs_target and not gate.in_time
        if present >= {Action(Kind.TARGET, index), Action(Kind.FIT, index)}
        if answered.get(index, Answer.ESTIMATE) is Answer.ESTIMATE
    )


def refuse_lag(wiring: Links, program: Program, lag: int) -> None:
    """Raise ScheduleError where a program has a boundary that cannot be fitted late."""
    if not lag:
        return
    if any(partition.every > 1 for partition in program.partitions):
        raise ScheduleError(
            f"lag={lag} does not go with every=: a target of several firings already comes late, once in a period. Leave lag= out"
        )
    if any(gate.late for gate in wiring.gates):
        raise ScheduleError(
            f"lag={lag} does not go with Late(k), which says itself how late gradients are. Leave lag= out"
        )
    for index, gate in enumerate(wiring.gates):
        reason = why_not_late(gate) if gate.fits and (gate.needs_target or gate.needs_loss) else ""
        if reason:
            raise ScheduleError(f"lag={lag} cannot be used: {reason} (boundary {index}, {wiring.names[index]!r})")


def why_not_late(gate: Gate) -> str:
    """Say why the estimator of a boundary cannot be fitted late, and what to do; empty where it can."""
    if gate.in_time:
        return "a state is cut in time, and its estimator is fitted when the next window runs. Leave the lag out"
    if gate.locked:
        return "the producer waits for the target, so the target cannot come late. Leave the lag out, or take an unlocked estimator"
    if gate.has_input_model:
        return "a synthetic input model is fitted in the same action, to values that are not kept. Leave the lag or inputs= out"
    if gate.needs_loss or gate.needs_error:
        return "the estimator needs the loss or the output's error, which are not kept. Leave the lag out, or take another estimator"
    if not gate.needs_target:
        return "the estimator learns without a target, so nothing comes late. Remove the lag there"
    return ""


def lag_faults(schedule: Schedule, wiring: Links) -> Iterator[Fault]:
    """Lags of an order that is valid without them, where they cannot be."""
    answered = answers_by_order(schedule.actions, wiring)
    lags: dict[int, tuple[Action, int]] = {}
    for place, action in enumerate(schedule.actions):
        if action.kind not in (Kind.TARGET, Kind.FIT):
            continue
        gate = wiring.gates[action.index]
        if gate.late:
            if action.lag not in (0, gate.late):
                yield place, f"its lag can only be {gate.late}, as Late({gate.late}) says. Remove -{action.lag}."
            continue
        reason = why_not_late(gate) if action.lag else ""
        if action.lag and answered.get(action.index, Answer.ESTIMATE) is not Answer.ESTIMATE:
            reason = reason or why_not_late(replace(gate, locked=True))
        if reason:
            yield place, f"its lag cannot be: {reason}."
        other = lags.setdefault(action.index, (action, action.lag))
        if other[1] != action.lag:
            yield place, f"its lag is {action.lag}, but that of {unplaced(other[0])} is {other[1]}. Give both the same."


@dataclass
class Lagged(Resumable):
    """Estimators are fitted to the targets of ``lag`` steps ago, and no partition waits for a target or for a tied parameter.

    Args:
        lag: Number of steps, 0 or more.
        then: The schedule without the lag; sequential by default.
        tied: Steps after which the other partitions read what an update makes of a tied parameter. By default as many; 0 where one
            of them waits for a true gradient anyway.
    """

    lag: int
    then: ScheduleSource = field(default_factory=Sequential)
    tied: int | None = None
    partial = True

    def __post_init__(self) -> None:
        at_least(0, lag=self.lag)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"lagged({self.lag}) of {self.then.name}"

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule of ``then`` with its targets used late. Until the first is due, fits find nothing to do.

        Raises:
            ScheduleError: A boundary cannot be fitted late.
        """
        tied = tied_lag(program, self.lag, self.tied)
        own, before, updated = (
            self.then.at(step - late if step >= late else step, program) for late in (0, self.lag, tied)
        )
        return lagged(own, program, self.lag, before, tied, updated)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; one from before tied parameters were read late says nothing of them, and goes on as it was.

        Raises:
            StateError: The state belongs to a source of another class.
        """
        super().load_state_dict({"tied": 0, **state} if state.get("source") == "Lagged" else state)
