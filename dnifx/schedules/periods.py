"""Systems whose parts fire at different rates: what each window of a period runs.

A period is written with bars between its windows: ``F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 T0 M0 U1``. In a window in which a part
does not fire, none of its actions stand; when it fires, it takes the messages of all windows since its last firing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

from dnifx.errors import ScheduleError
from dnifx.ir import BAR, Action, Kind, Period, Program, Schedule
from dnifx.schedules.dependencies import Answer, Links, answers_by_order, links
from dnifx.schedules.language import parse_period, unplaced
from dnifx.schedules.orders import Choice, arranged, chosen_actions, eager, placed, trained
from dnifx.schedules.sources import Resumable
from dnifx.schedules.validation import validate


def rates(program: Program) -> tuple[int, ...]:
    """Return the windows from one firing to the next, of each partition."""
    return tuple(partition.every for partition in program.partitions)


def fires(every: int, window: int) -> bool:
    """Whether a part that fires in every ``every``-th window does so in this one; windows count from 0."""
    return (window + 1) % every == 0


def sequential_period(program: Program) -> Period:
    """Return the period in which each window runs the partitions that fire, one after the other.

    Args:
        program: A program with partitions, boundaries and interfaces.
    """
    return _sequential_period(links(program), rates(program))


@lru_cache(maxsize=32)
def _sequential_period(wiring: Links, every: tuple[int, ...]) -> Period:
    return Period("sequential", tuple(_window(wiring, every, window) for window in range(lcm(*every))))


def _window(wiring: Links, every: tuple[int, ...], window: int) -> Schedule:
    firing = frozenset(index for index in wiring.partitions if fires(every[index], window))
    actions = chosen_actions(Choice(firing, trained(wiring) & firing), wiring)
    return Schedule("sequential", arranged(actions, wiring, eager, {}))


def validate_period(period: Period, program: Program) -> None:
    """Check a period: its length, who fires when, and each window by itself.

    Args:
        period: What the windows run.
        program: A program whose partitions have rates.

    Raises:
        ScheduleError: With what is wrong, and what to do.
    """
    every = rates(program)
    if len(period.windows) % lcm(*every):
        known = ", ".join(f"{part.name} every {part.every}" for part in program.partitions)
        raise ScheduleError(
            f"The period {period.name!r} has {len(period.windows)} windows, but its parts come round after {lcm(*every)} ({known}). "
            f"Write {lcm(*every)} windows with {BAR} between them."
        )
    for number, window in enumerate(period.windows):
        for text in _wrong_firings(window, program, number):
            raise ScheduleError(f"Window {number} of the period {period.name!r}: {text}")
        validate(window, program, partial=True)


def _wrong_firings(window: Schedule, program: Program, number: int) -> Iterator[str]:
    wiring, bare = links(program), tuple(map(unplaced, window.actions))
    for partition in program.partitions:
        due = fires(partition.every, number)
        for kind in (Kind.FORWARD, Kind.BACKWARD) if partition.index in trained(wiring) else (Kind.FORWARD,):
            action = Action(kind, partition.index)
            if due and action not in bare:
                yield f"{partition.name} fires every {partition.every}, and so here; {action} is lacking. Add it."
            if action in bare and not due:
                yield f"{partition.name} fires every {partition.every}, and so not here. Remove {action}."
    answered = answers_by_order(bare, wiring)
    for boundary in program.boundaries:
        slower = [index for index in boundary.consumers if rates(program)[index] != rates(program)[boundary.producer]]
        if slower and answered.get(boundary.index, Answer.ESTIMATE) is not Answer.ESTIMATE:
            yield (
                f"submod_{boundary.producer} would wait for the target of {boundary.name!r}, which comes once in {boundary.messages} of "
                f"its firings. Put S{boundary.index} before B{boundary.producer}."
            )
    rate = [rates(program)[wiring.place(a)] for a in bare if a.kind not in (Kind.SYNTHESISE, Kind.TARGET, Kind.FIT)]
    if rate != sorted(rate):
        yield "the actions of parts of different rates are mixed. Write those of the faster part first."


@dataclass
class Cycle(Resumable):
    """Every window of a period in turn."""

    text: str
    name: str
    partial = True

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule of a window, counted from 0."""
        windows = _parsed(self.text, self.name).windows
        return windows[step % len(windows)]


@lru_cache(maxsize=32)
def _parsed(text: str, name: str) -> Period:
    return parse_period(text, name)


def period_of(spec: object, program: Program) -> Period:
    """Return the period that a user asked for, after checking it.

    Args:
        spec: ``"sequential"``, a period, or its text.
        program: The program, whose partitions have rates.

    Raises:
        ScheduleError: It is none of these, or not valid for the program.
    """
    if spec == "sequential":
        period = sequential_period(program)
    elif isinstance(spec, Period):
        period = spec
    elif isinstance(spec, str) and BAR in spec:
        period = parse_period(spec)
    else:
        raise ScheduleError(
            f"{spec!r} is no schedule of a system whose parts fire at different rates. Give 'sequential', or a period with {BAR} "
            f"between its windows: {sequential_period(program)}"
        )
    validate_period(period, program)
    return period


def resolve_period(spec: object, program: Program) -> Cycle:
    """Return the source of a period that a user asked for, after checking it; see ``period_of``."""
    period = period_of(spec, program)
    return Cycle(str(period), period.name)


def placed_period(period: Period, program: Program, devices: Iterable[str]) -> Period:
    """Return the period with a device for each partition; see ``placed``.

    Raises:
        ScheduleError: The number of devices is not that of the partitions.
    """
    names = tuple(devices)
    return replace(period, windows=tuple(placed(window, program, names) for window in period.windows))
