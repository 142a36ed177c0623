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
    RENEW = "R"
    SEND_VALUES = "SEND_F"
    RECEIVE_VALUES = "RECV_F"
    SEND_TARGET = "SEND_T"
    RECEIVE_TARGET = "RECV_T"
    SEND_GRADIENTS = "SEND_B"
    RECEIVE_GRADIENTS = "RECV_B"
    SEND_WEIGHTS = "SEND_U"
    RECEIVE_WEIGHTS = "RECV_U"
    SEND_COPIES = "SEND_S"
    RECEIVE_COPIES = "RECV_S"


RECEIVED = {
    Kind.RECEIVE_VALUES: Kind.SEND_VALUES,
    Kind.RECEIVE_TARGET: Kind.SEND_TARGET,
    Kind.RECEIVE_GRADIENTS: Kind.SEND_GRADIENTS,
    Kind.RECEIVE_WEIGHTS: Kind.SEND_WEIGHTS,
    Kind.RECEIVE_COPIES: Kind.SEND_COPIES,
}
"""What each receive takes."""

SENDS = frozenset(RECEIVED.values())
"""What sends something from one rank to another."""

TRANSFERS = SENDS | RECEIVED.keys()
"""What moves values, gradients or weights from one rank to another."""


READS_TIED = frozenset({Kind.FORWARD, Kind.UPDATE, Kind.RENEW})
"""Actions whose lag is that of tied parameters."""


@dataclass(frozen=True)
class Action:
    """One step of a schedule, written ``F1``, ``B1@cuda:0``, ``F1@rank1:cuda:0/2`` (rank, device, stream) or ``M0-4`` (lag).

    ``index`` numbers a partition for ``F`` (forward), ``B`` (backward), ``U`` (update), ``I`` (synthetic input) and for the
    transfers of the values that its forward made, of the gradients that its backward pass gave to parameters of another rank, and
    of the parameters that its update changed. So it does for ``R`` (renew: an earlier update reaches the other partitions that read
    the same parameters). It numbers a boundary for ``S`` (synthesise: ask the estimator), ``T`` (the
    target arrives), ``M`` (fit) and for the transfers of its target and of the parameters that its estimator copies. Transfers
    name the other rank: ``SEND_F0@rank0>rank1``, ``RECV_F0@rank1<rank0``.

    Attributes:
        kind: What it does.
        index: The number of its partition or boundary.
        device: The device that it runs on.
        stream: The stream that it runs on.
        rank: The process that it runs in.
        lag: Steps between a target and the fit that uses it. ``T0-4``: the target of this step is used 4 steps later.
            ``M0-4``: fit with the target of 4 steps ago. ``B0-4``: the backward pass of the step 4 ago. ``F0-4``: what other
            partitions update is read as it was 4 steps ago. ``U1-4``: other partitions read what this update makes 4 steps later;
            ``R1-4``: from now on they read what the update of 4 steps ago made.
        peer: The rank at the other end of a transfer.
    """

    kind: Kind
    index: int
    device: str | None = None
    stream: int | None = None
    rank: int | None = None
    lag: int = 0
    peer: int | None = None

    @property
    def place(self) -> str:
        """Where it runs, as its text says it: ``@rank1:cuda:0/2``; empty where it is not said."""
        names = [] if self.rank is None else [f"rank{self.rank}"]
        names += [] if self.device is None else [self.device]
        return (f"@{':'.join(names)}" if names else "") + ("" if self.stream is None else f"/{self.stream}")

    def __str__(self) -> str:
        lag = f"-{self.lag}" if self.lag else ""
        peer = "" if self.peer is None else f"{'>' if self.kind in SENDS else '<'}rank{self.peer}"
        return f"{self.kind}{self.index}{lag}{self.place}{peer}"


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

    @property
    def tied_lag(self) -> int:
        """How many steps late it reads tied parameters; 0 where it says nothing of it."""
        return next((each.lag for each in self.actions if each.lag and each.kind in READS_TIED), 0)


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
