"""What a training step runs: actions, schedules, periods."""

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

    ``F`` forward, ``B`` backward, ``U`` update and ``I`` synthetic input act on the partition of that index; ``S`` synthesise,
    ``T`` target arrives and ``M`` fit the estimator act on the boundary of that index.
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
    """What one training step runs, in which order and where; ``str`` prints it and ``dnifx.schedules.parse`` reads it back."""

    name: str
    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.actions))


BAR = "|"
"""What stands between the windows of a period."""


@dataclass(frozen=True)
class Period:
    """What the windows of a period run, in turn; ``str`` prints it and ``dnifx.schedules.parse_period`` reads it back."""

    name: str
    windows: tuple[Schedule, ...]

    def __str__(self) -> str:
        return f" {BAR} ".join(map(str, self.windows))
