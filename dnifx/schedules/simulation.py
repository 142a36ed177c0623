"""When each action of a schedule would run, given its cost: makespan, idle devices, memory, the lock that costs most."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Column, Table

from dnifx.errors import ScheduleError
from dnifx.ir import Kind, Period, Program, Schedule
from dnifx.schedules.clock import Clock, Link, Numbers, Span, turns_of
from dnifx.schedules.costs import given_costs, measured_costs
from dnifx.schedules.locking import Lock
from dnifx.schedules.validation import BESIDE, validate
from dnifx.units import quantity

_PASSING = frozenset({Kind.FORWARD, Kind.INPUT, Kind.SYNTHESISE, Kind.SEND_VALUES, Kind.RECEIVE_VALUES})
_ARRIVING = frozenset({Kind.TARGET, Kind.FIT})


@dataclass(frozen=True)
class Simulation:
    """A schedule in time.

    Attributes:
        name: Name of the schedule.
        unit: Unit of every time: ``flop`` (a device does one at a time) or ``s``.
        steps: Number of training steps. They overlap where they do not depend on each other.
        spans: The actions, in the order of issue.
        makespan: When the last action ends.
        bubble: By device, the share of the makespan in which it does nothing.
        peak_bytes: By device, the most bytes of activations held at a time. A partition's activations are held from its
            forward to the end of its backward.
        critical: Indices of the spans on the critical path, in order of time.
    """

    name: str
    unit: str
    steps: int
    spans: tuple[Span, ...]
    makespan: float
    bubble: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    critical: tuple[int, ...]

    @cached_property
    def waits(self) -> Mapping[Lock, float]:
        """By lock, the time for which actions on the critical path waited for it while their streams stood still."""
        return _waits(self.spans, self.critical)

    @property
    def rate(self) -> float:
        """Steps in a unit of time, once the first ones have filled the ranks: over the later half of the steps."""
        ends = [0.0] * self.steps
        for span in self.spans:
            ends[span.step] = max(ends[span.step], span.end)
        last, half = self.steps - 1, (self.steps - 1) // 2
        seconds = ends[last] - (ends[half] if last else 0.0)
        return (last - half if last else 1) / seconds if seconds else inf

    @property
    def binds(self) -> Lock | None:
        """The lock that the critical path waits for longest; None where nothing on it waits for another partition."""
        lock = max(self.waits, key=lambda each: self.waits[each])
        return lock if self.waits[lock] > 0 else None

    def __rich__(self) -> RenderableType:
        table = Table("device", Column("idle", justify="right"), Column("peak activations", justify="right"))
        for device, idle in self.bubble.items():
            table.add_row(device, f"{idle:.1%}", decimal(self.peak_bytes[device]))
        time = quantity(self.makespan, "FLOP") if self.unit == "flop" else f"{self.makespan:.4g} {self.unit}"
        head = f"{self.name}: {self.steps} step{'s' if self.steps > 1 else ''} in {time}"
        total = sum(self.waits.values())
        waits = ", ".join(f"{lock} {self.waits[lock] / total:.0%}" for lock in Lock if self.waits[lock] > 0)
        foot = f"waiting on the critical path, by lock: {waits}" if waits else "no lock holds up the critical path"
        return Group(head, table, foot)


def simulate(
    schedule: Schedule | Period,
    program: Program,
    costs: Mapping[str, float] | None = None,
    steps: int = 1,
    link: Link | None = None,
) -> Simulation:
    """Simulate when each action would run.

    Actions on one device and stream run in the schedule's order. Actions on different ones run at the same time, as
    soon as what they need has ended. From one step to the next, a partition's forward waits for the updates of its
    parameters, and an estimator and an input model wait for their fits. A fit with a lag waits for the target of so many
    steps before, and a forward pass that reads tied parameters late for the update of so many steps before. Moving values
    between devices costs nothing unless ``T`` is given a cost. A receive waits until the link has brought what was sent.

    Args:
        schedule: A schedule of the program, whole or partial, or a period.
        program: The program.
        costs: Seconds of each action by its name (``{"F0": 0.1, ...}``); by default FLOPs, as measured.
        steps: Number of steps (or periods) to run. Unlocked partitions on several devices overlap between steps.
        link: The link between ranks; by default transfers take no time.

    Raises:
        ScheduleError: The schedule is not valid, or the costs do not fit it.
    """
    if steps < 1:
        raise ScheduleError(f"Cannot simulate {steps=}; give one or more.")
    validate(schedule, program, partial=True)
    windows = schedule.windows
    actions = [action for window in windows for action in window.actions if action.kind not in BESIDE]
    if costs is None and link is not None:
        raise ScheduleError(
            "A link takes seconds, and costs are in FLOPs where none are given: give costs= in seconds too."
        )
    known = measured_costs(program) if costs is None else given_costs(costs, actions)
    clock, numbers = Clock(link or Link()), Numbers()
    turns = [turns_of(window, program, known, clock.link, numbers) for window in windows]
    for step in range(steps * len(windows)):
        clock.run(step, turns[step % len(windows)])
    spans = tuple(clock.spans)
    makespan = max((span.end for span in spans), default=0.0)
    return Simulation(
        name=schedule.name,
        unit="flop" if costs is None else "s",
        steps=steps * len(windows),
        spans=spans,
        makespan=makespan,
        bubble=_bubbles(spans, makespan),
        peak_bytes=_peaks(spans, program),
        critical=_critical(spans),
    )


def _critical(spans: tuple[Span, ...]) -> tuple[int, ...]:
    """The chain of causes that leads to the last action, as indices of spans."""
    place = max(range(len(spans)), key=lambda each: spans[each].end, default=None)
    path = []
    while place is not None:
        path.append(place)
        place = spans[place].cause
    return tuple(reversed(path))


def _waits(spans: tuple[Span, ...], critical: Iterable[int]) -> dict[Lock, float]:
    """Divide the time for which streams of the critical path stood still among the locks that held them up.

    Streams that carry only targets and fits are left out: nothing waits while they wait.
    """
    waits = dict.fromkeys(Lock, 0.0)
    working = {(span.device, span.stream) for span in spans if span.action.kind not in _ARRIVING}
    for waiter in (spans[place] for place in critical if (spans[place].device, spans[place].stream) in working):
        cause = waiter.cause
        while cause is not None and spans[cause].end > waiter.free:
            blocker = spans[cause]
            lock = _lock_between(waiter, blocker)
            if lock is not None:
                waits[lock] += blocker.end - max(waiter.free, blocker.start)
            cause = blocker.cause
    return waits


def _lock_between(waiter: Span, blocker: Span) -> Lock | None:
    """The lock by which one action holds up another; None within a partition."""
    if waiter.partition == blocker.partition:
        return None
    if blocker.action.kind not in _PASSING:
        return Lock.BACKWARD
    return Lock.FORWARD if waiter.action.kind in (Kind.FORWARD, Kind.INPUT) else Lock.UPDATE


def _bubbles(spans: tuple[Span, ...], makespan: float) -> dict[str, float]:
    """Share of the makespan in which no stream of a device runs anything."""
    devices: dict[str, list[tuple[float, float]]] = {}
    for span in spans:
        devices.setdefault(span.device, []).append((span.start, span.end))
    if makespan == 0:
        return dict.fromkeys(devices, 0.0)
    return {device: max(0.0, 1 - _covered(intervals) / makespan) for device, intervals in devices.items()}


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, 0.0
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _peaks(spans: tuple[Span, ...], program: Program) -> dict[str, int]:
    peaks = dict.fromkeys((span.device for span in spans), 0)
    held = dict.fromkeys(peaks, 0)
    for _, change, device in sorted(_holdings(spans, program)):
        held[device] += change
        peaks[device] = max(peaks[device], held[device])
    return peaks


def _holdings(spans: tuple[Span, ...], program: Program) -> Iterator[tuple[float, int, str]]:
    """When activations are made and dropped: (time, change in bytes, device). At the same time, drops sort first."""
    ends = {(span.step, span.partition): span.end for span in spans if span.action.kind is Kind.BACKWARD}
    for span in spans:
        if span.action.kind is Kind.FORWARD:
            size = program.partitions[span.partition].activation_bytes
            yield span.start, size, span.device
            yield ends.get((span.step, span.partition), span.end), -size, span.device
