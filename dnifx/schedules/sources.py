"""What a trainer asks, step after step, for a schedule: one that stays the same, or one that depends on the step."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from dnifx.errors import ScheduleError, StateError
from dnifx.ir import Program, Schedule
from dnifx.schedules import orders
from dnifx.schedules.language import parse


@runtime_checkable
class ScheduleSource(Protocol):
    """Gives each training step its schedule.

    ``at`` depends on its arguments and on the source's own state alone, so that a run can be resumed at any step;
    where the schedule does not change, it returns the same object.
    """

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def partial(self) -> bool:
        """Whether a step may leave partitions idle or estimators unfitted (``validate(..., partial=True)``)."""

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule of a step, counted from 0."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to draw the same schedules again."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that ``state_dict`` gave; raise StateError if it is another source's."""


@dataclass
class Resumable:
    """A source whose state is its fields; those that are sources themselves are saved and loaded as such."""

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the kind of source and its fields."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        saved = {
            key: value.state_dict() if isinstance(value, ScheduleSource) else _plain(value)
            for key, value in values.items()
        }
        return {"source": type(self).__name__, **saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the fields, seeds among them.

        Raises:
            StateError: The state is that of another kind of source.
        """
        names = [each.name for each in fields(self)]
        if state.get("source") != type(self).__name__ or set(state) != {"source", *names}:
            raise StateError(
                f"The saved schedule is {state.get('source')!r} with {sorted(set(state) - {'source'})}, "
                f"but the trainer was made with {type(self).__name__} and {names}. "
                "Make the trainer with the schedule that was saved."
            )
        for name in names:
            own = getattr(self, name)
            if isinstance(own, ScheduleSource):
                own.load_state_dict(state[name])
            else:
                setattr(self, name, _read(own, state[name]))


def _plain(value: Any) -> Any:
    return {"name": value.name, "actions": str(value)} if isinstance(value, Schedule) else value


def _read(own: Any, saved: Any) -> Any:
    return parse(saved["actions"], saved["name"]) if isinstance(own, Schedule) else saved


@dataclass
class Sequential(Resumable):
    """Every step is ``sequential(program)``."""

    name = "sequential"
    partial = False

    def at(self, step: int, program: Program) -> Schedule:
        """Return the sequential schedule of the program."""
        return orders.sequential(program)


@dataclass
class Backprop(Resumable):
    """Every step is ``backprop(program, fit)``: producers wait for the target, whatever stands on the boundaries."""

    fit: bool = True
    name = "backprop"
    partial = True

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule in which every producer waits."""
        return orders.backprop(program, self.fit)


@dataclass
class Fixed(Resumable):
    """Every step is the same schedule."""

    schedule: Schedule
    partial: bool = False

    @property
    def name(self) -> str:
        """The name of the schedule."""
        return self.schedule.name

    def at(self, step: int, program: Program) -> Schedule:
        """Return the schedule."""
        return self.schedule


def fixed(schedule: Schedule, partial: bool = False) -> Fixed:
    """Return a source that gives every step the same schedule.

    Args:
        schedule: The schedule.
        partial: Whether it means to leave partitions idle or estimators unfitted.
    """
    return Fixed(schedule, partial)


@dataclass
class WarmUp(Resumable):
    """Estimators are fitted for some steps before their first use; meanwhile the true gradients are used."""

    steps: int
    then: ScheduleSource
    partial = True

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"warm_up({self.steps}) then {self.then.name}"

    def at(self, step: int, program: Program) -> Schedule:
        """Return the waiting schedule for the first ``steps`` steps, then that of ``then``."""
        return orders.backprop(program) if step < self.steps else self.then.at(step, program)


@dataclass
class FitEvery(Resumable):
    """Estimators and input models are fitted in one step of ``every`` only; the others compute no target for them."""

    every: int
    then: ScheduleSource
    partial = True

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
    """Phases of true gradients, in which the estimators are refreshed, and of synthetic ones, in turn."""

    true: int
    synthetic: int
    then: ScheduleSource
    bootstrap: bool = True
    partial = True

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"alternate({self.true} true, {self.synthetic} synthetic) of {self.then.name}"

    def at(self, step: int, program: Program) -> Schedule:
        """Return the waiting schedule in a true phase, else that of ``then``, without fits unless ``bootstrap``."""
        if step % (self.true + self.synthetic) < self.true:
            return orders.backprop(program)
        schedule = self.then.at(step, program)
        return schedule if self.bootstrap else orders.without_fits(schedule, program)


def warm_up(steps: int, then: ScheduleSource | None = None) -> WarmUp:
    """Fit the estimators for some steps before their first use; until then every producer waits for the true gradient.

    Args:
        steps: Number of those steps.
        then: What follows; sequential by default.
    """
    return WarmUp(at_least(0, steps=steps), then or Sequential())


def fit_every(every: int, then: ScheduleSource | None = None) -> FitEvery:
    """Fit estimators and input models in one step of ``every`` (the first, then every ``every``-th).

    Args:
        every: One or more.
        then: The schedule whose fits are left out in the other steps; sequential by default.
    """
    return FitEvery(at_least(1, every=every), then or Sequential())


def alternate(true: int, synthetic: int, then: ScheduleSource | None = None, bootstrap: bool = True) -> Alternate:
    """Alternate ``true`` steps of true gradients, which the estimators are fitted to, with ``synthetic`` steps.

    Args:
        true: Steps of each true phase; it comes first.
        synthetic: Steps of each synthetic phase.
        then: The schedule of the synthetic phases; sequential by default.
        bootstrap: Fit in the synthetic phases too, to targets that are bootstrapped.
    """
    return Alternate(at_least(1, true=true), at_least(1, synthetic=synthetic), then or Sequential(), bootstrap)


def at_least(least: int, **given: int) -> int:
    """Return the one value given by name; raise ScheduleError where it is less than ``least``."""
    ((name, value),) = given.items()
    if value < least:
        raise ScheduleError(f"{name}={value} for a schedule; expected {least} or more.")
    return value
