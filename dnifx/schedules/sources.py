"""Sources: a trainer asks its source for the schedule of each step, which may depend on the step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from dnifx.errors import ScheduleError, StateError
from dnifx.ir import Period, Program, Schedule
from dnifx.schedules import orders
from dnifx.schedules.language import read


@runtime_checkable
class ScheduleSource(Protocol):
    """Gives each training step its schedule.

    ``at`` depends on its arguments and on the source's own state alone, so a run can be resumed at any step. Where the
    schedule does not change, ``at`` returns the same object.
    """

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def partial(self) -> bool:
        """Whether a step may leave partitions idle or estimators unfitted (``validate(..., partial=True)``)."""

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule of a step (of a window, where partitions fire at different rates), counted from 0."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to give the same schedules again."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from ``state_dict``; raise StateError if it belongs to another source."""


@dataclass
class Resumable:
    """A source whose state is its fields; a field may be a source itself."""

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the class and the fields."""
        saved = {each.name: _saved(getattr(self, each.name)) for each in fields(self)}
        return {"source": type(self).__name__, **saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the fields, seeds among them.

        Raises:
            StateError: The state belongs to a source of another class.
        """
        names = [each.name for each in fields(self)]
        if state.get("source") != type(self).__name__ or set(state) != {"source", *names}:
            raise StateError(
                f"The saved schedule is {state.get('source')!r} with {sorted(set(state) - {'source'})}, "
                f"but the trainer was made with {type(self).__name__} and {names}. "
                "Make the trainer with the schedule that was saved."
            )
        for name in names:
            own, saved = getattr(self, name), state[name]
            if isinstance(own, ScheduleSource):
                own.load_state_dict(saved)
            elif isinstance(own, Schedule | Period):
                setattr(self, name, read(saved["actions"], saved["name"]))
            else:
                setattr(self, name, saved)


def _saved(value: Any) -> Any:
    if isinstance(value, ScheduleSource):
        return value.state_dict()
    return {"name": value.name, "actions": str(value)} if isinstance(value, Schedule | Period) else value


@dataclass
class Sequential(Resumable):
    """Every step is ``sequential(program)``; with rates, the windows of ``sequential_period(program)`` take turns."""

    name = "sequential"
    partial = False

    def at(self, step: int, program: Program) -> Schedule:
        """Return the sequential schedule of a step or window."""
        return orders.sequential_window(program, step)


@dataclass
class Phases(Resumable):
    """Every step is ``phases(program)``: what is of one kind stands together."""

    name = "phases"
    partial = False

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule in phases."""
        return orders.phases(program)


@dataclass
class Backprop(Resumable):
    """Every step is ``backprop(program, fit)``: every producer waits for the target, whatever the estimators."""

    fit: bool = True
    name = "backprop"
    partial = True

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule in which every producer waits."""
        return orders.backprop(program, self.fit)


@dataclass
class Fixed(Resumable):
    """Every step runs the same schedule.

    Args:
        schedule: The schedule, or a period whose windows take turns.
        partial: Whether the schedule leaves partitions idle or estimators unfitted on purpose.
    """

    schedule: Schedule | Period
    partial: bool = False

    @property
    def name(self) -> str:
        """The name of the schedule."""
        return self.schedule.name

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule, or the window of the period."""
        return self.schedule.windows[step % len(self.schedule.windows)]


@dataclass
class WarmUp(Resumable):
    """Estimators are fitted for some steps before their first use; until then every producer waits for the true gradient.

    Args:
        steps: Number of these steps, 0 or more.
        then: What follows; sequential by default.
    """

    steps: int
    then: ScheduleSource = field(default_factory=Sequential)
    partial = True

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"warm_up({self.steps}) then {self.then.name}"

    def at(self, step: int, program: Program) -> Schedule:
        """Return backpropagation for the first ``steps`` steps, then what ``then`` gives."""
        return orders.backprop(program) if step < self.steps else self.then.at(step, program)


@dataclass
class FitEvery(Resumable):
    """Estimators and input models are fitted in the first of every ``every`` steps; the others compute no target for them.

    Args:
        every: Number of steps from one fit to the next, 1 or more.
        then: The schedule, whose fits the other steps leave out; sequential by default.
    """

    every: int
    then: ScheduleSource = field(default_factory=Sequential)
    partial = True

    def __post_init__(self) -> None:
        at_least(1, every=self.every)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"fit_every({self.every}) of {self.then.name}"

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule of ``then``, without its fits unless ``step`` is a multiple of ``every``."""
        schedule = self.then.at(step, program)
        return schedule if step % self.every == 0 else orders.without_fits(schedule, program)


@dataclass
class Alternate(Resumable):
    """Phases of true gradients, to which the estimators are fitted, and phases of synthetic gradients take turns.

    Args:
        true: Steps of each true phase, 1 or more; a true phase comes first.
        synthetic: Steps of each synthetic phase, 1 or more.
        then: The schedule of the synthetic phases; sequential by default.
        bootstrap: Fit in the synthetic phases too; targets there contain estimates from further behind.
    """

    true: int
    synthetic: int
    then: ScheduleSource = field(default_factory=Sequential)
    bootstrap: bool = True
    partial = True

    def __post_init__(self) -> None:
        at_least(1, true=self.true, synthetic=self.synthetic)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"alternate({self.true} true, {self.synthetic} synthetic) of {self.then.name}"

    def at(self, step: int, program: Program) -> Schedule:
        """Return backpropagation in a true phase, else what ``then`` gives, without fits unless ``bootstrap``."""
        if step % (self.true + self.synthetic) < self.true:
            return orders.backprop(program)
        schedule = self.then.at(step, program)
        return schedule if self.bootstrap else orders.without_fits(schedule, program)


def at_least(least: int, **given: int) -> None:
    """Raise ScheduleError if a value, given by name, is less than ``least``."""
    for name, value in given.items():
        if value < least:
            raise ScheduleError(f"{name}={value} is too small for a schedule; give {least} or more.")


fixed, warm_up, fit_every, alternate = Fixed, WarmUp, FitEvery, Alternate
