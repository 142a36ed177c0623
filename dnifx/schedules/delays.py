"""Delays: backward passes of earlier steps, whose true gradient has come late (``dnifx.estimators.Late``).

``T0-4`` takes the target of this step for a backward pass 4 steps later, or, over ranks, the target that was sent 4 steps ago.
``B0-4`` is the backward pass of the step 4 ago.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from dnifx.errors import ScheduleError
from dnifx.ir import Kind, Program, Schedule
from dnifx.schedules.chance import RandomOrder, Unlocked
from dnifx.schedules.dependencies import Links, links
from dnifx.schedules.sources import Resumable, ScheduleSource

Fault = tuple[int, str]
"""The position of a wrong action, and what is wrong with it."""


@lru_cache(maxsize=256)
def delays(wiring: Links) -> tuple[int, ...]:
    """Return, for each partition, how many steps late its backward pass is; 0 where no boundary is late."""
    found = [0] * len(wiring.partitions)
    for index in reversed(wiring.partitions):
        late = [wiring.gates[each] for each in wiring.produced[index] if wiring.gates[each].late]
        found[index] = max((gate.late + max(found[user] for user in gate.consumers) for gate in late), default=0)
    return tuple(found)


def is_delayed(program: Program) -> bool:
    """Whether the boundaries of a program get true gradients late."""
    return any(interface.late for interface in program.interfaces)


def delayed(schedule: Schedule, program: Program) -> Schedule:
    """Return a schedule whose backward passes are those of earlier steps; the same where no boundary is late.

    Raises:
        ScheduleError: The program or the schedule cannot run so.
    """
    if not is_delayed(program):
        return schedule
    refuse_delays(program)
    wiring = links(program)
    made = _delayed(schedule, wiring)
    given = {(action.kind, action.index) for action in schedule.actions}
    for boundary, gate in enumerate(wiring.gates):
        for kind, index in ((Kind.FORWARD, gate.producer), *((Kind.BACKWARD, user) for user in gate.consumers)):
            if (kind, index) not in given:
                raise ScheduleError(
                    f"Late brings the gradient of every step, and the schedule {schedule.name!r} leaves out {kind}{index} at boundary "
                    f"{boundary}, {wiring.names[boundary]!r}. Use a schedule in which every partition runs, such as sequential."
                )
    return made


@lru_cache(maxsize=256)
def _delayed(schedule: Schedule, wiring: Links) -> Schedule:
    late = delays(wiring)
    by_kind = {Kind.BACKWARD: late, Kind.TARGET: tuple(gate.late for gate in wiring.gates)}
    actions = tuple(
        replace(action, lag=by_kind[action.kind][action.index]) if action.kind in by_kind else action
        for action in schedule.actions
    )
    return replace(schedule, actions=actions)


def refuse_delays(program: Program) -> None:
    """Raise ScheduleError where late gradients do not go with the rest of a program."""
    wiring, kinds = links(program), {interface.late for interface in program.interfaces}
    reason = ""
    if len(kinds) > 1:
        reason = "some boundaries have another estimator, or another k. Give all boundaries the same Late(k)"
    elif program.parts or any(gate.in_time for gate in wiring.gates) or program.carries:
        reason = "there are rates or cuts in time. Leave them out, or take a synthetic gradient"
    elif any(interface.input_model is not None for interface in program.interfaces):
        reason = "synthetic inputs take the place of values. Leave inputs= out"
    elif program.signature is not None and program.signature.left:
        reason = "forward leaves values on the model. Take a synthetic gradient"
    else:
        for owner, users in enumerate(wiring.users):
            if late_users := sorted(users - {owner}):
                reason = (
                    f"partitions {late_users[0]} and {owner} share a parameter, and their gradients are of different steps. Cut "
                    "elsewhere, or take a synthetic gradient"
                )
    if reason:
        raise ScheduleError(f"Late(k) cannot be used: {reason}.")


def delay_faults(schedule: Schedule, wiring: Links) -> Iterator[Fault]:
    """Backward passes with another lag than the boundaries behind them ask for."""
    late = delays(wiring)
    for place, action in enumerate(schedule.actions):
        if action.kind is Kind.BACKWARD and action.lag not in (0, late[action.index]):
            text = f"its lag can only be {late[action.index]}: " if late[action.index] else "it has a lag, but "
            yield place, f"{text}only a gradient of Late(k) makes a backward pass late. Remove -{action.lag}."


@dataclass
class Delayed(Resumable):
    """A schedule whose backward passes are those of earlier steps, as Late(k) asks for.

    Args:
        then: The schedule of a step that waits.
    """

    then: ScheduleSource
    partial = True

    def __post_init__(self) -> None:
        if isinstance(self.then, RandomOrder | Unlocked):
            raise ScheduleError(
                f"Late brings the gradient of every step, and the schedule {self.then.name!r} leaves partitions out. Use a schedule in "
                "which every partition runs, such as sequential."
            )

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.then.name

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule of a step.

        Raises:
            ScheduleError: The program or the schedule cannot run so.
        """
        return delayed(self.then.at(step, program), program)
