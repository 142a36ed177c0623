"""What a training step runs: actions, schedules and periods."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does."""

    FORWARD = "F"
    SYNTHESISE = "S"
    BACKWARD = "B"
    UPDATE = "U"
    INPUT = "I"
    TARGET = "T"
    FIT = "M"


@dataclass(frozen=True)
class Action:
    """One step of a schedule, written ``F1``, ``B1@cuda:0`` or ``F1@cuda:0/2`` (device, stream).

    ``index`` numbers a partition for ``F`` (forward), ``B`` (backward), ``U`` (update) and ``I`` (synthetic input).
    It numbers a boundary for ``S`` (synthesise: ask the estimator), ``T`` (the target arrives) and ``M`` (fit).
    """

    kind: Kind
    index: int
    device: str | None = None
    stream: int | None = None

    def __str__(self) -> str:
        place = "" if self.device is None else f"@{self.device}"
        stream = "" if self.stream is None else f"/{self.stream}"
        return f"{self.kind}{self.index}{place}{stream}"


@dataclass(frozen=True)
class Schedule:
    """The actions of one training step, in order; ``dnifx.schedules.parse`` reads back what ``str`` prints."""

    name: str
    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.actions))

    @property
    def windows(self) -> tuple["Schedule", ...]:
        """The schedule itself: it is a period of one window."""
        return (self,)


BAR = "|"
"""What stands between the windows of a period in its text."""


@dataclass(frozen=True)
class Period:
    """One schedule for each window of a period; ``dnifx.schedules.parse_period`` reads back what ``str`` prints.

    Partitions that fire at different rates need several windows before the pattern repeats: a period.
    """

    name: str
    windows: tuple[Schedule, ...]

    def __str__(self) -> str:
        return f" {BAR} ".join(map(str, self.windows))
