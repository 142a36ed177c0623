"""The schedule language: actions as text and back."""

import re
from collections.abc import Iterable, Sequence

import torch

from dnifx.errors import ScheduleError
from dnifx.ir import BAR, Action, Kind, Period, Schedule

_WORD = re.compile(r"(?P<kind>[A-Z])(?P<index>\d+)(?:@(?P<device>[^\s/]+))?(?:/(?P<stream>\d+))?")
_COMMENT = re.compile(r"#[^\r\n]*")
_MEANINGS = {
    Kind.FORWARD: "forward of partition",
    Kind.BACKWARD: "backward of partition",
    Kind.UPDATE: "update of partition",
    Kind.INPUT: "synthetic input of partition",
    Kind.SYNTHESISE: "estimate at boundary",
    Kind.TARGET: "target of boundary",
    Kind.FIT: "fit at boundary",
}
_ON_PARTITIONS = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE, Kind.INPUT})


def on_partition(kind: Kind) -> bool:
    """Whether the index of such an action is a partition's; for the other kinds it is a boundary's."""
    return kind in _ON_PARTITIONS


def unplaced(action: Action) -> Action:
    """Return the action without its device and stream."""
    return action if action.device is None and action.stream is None else Action(action.kind, action.index)


def listed(actions: Iterable[Action]) -> str:
    """Return actions as text for an error, sorted: ``F0, S0``."""
    return ", ".join(map(str, sorted(actions, key=lambda action: (action.index, action.kind.value))))


def described(action: Action, boundaries: Sequence[str]) -> str:
    """Return an action with its meaning, given the boundaries' names: ``T0 (target of boundary 0, 'layer1')``."""
    has_name = not on_partition(action.kind) and action.index < len(boundaries)
    name = f", {boundaries[action.index]!r}" if has_name else ""
    return f"{unplaced(action)} ({_MEANINGS[action.kind]} {action.index}{name})"


def looks_like_actions(text: str) -> bool:
    """Whether the text spells a schedule or a period out, and is not the name of one."""
    return BAR in text or _WORD.fullmatch(next(iter(_words(text)), "")) is not None


def read(text: str, name: str = "text") -> Schedule | Period:
    """Read a period where the text has bars, else a schedule."""
    return parse_period(text, name) if BAR in _COMMENT.sub("", text) else parse(text, name)


def parse(text: str, name: str = "text") -> Schedule:
    """Read a schedule as ``str`` prints it. ``#`` begins a comment that runs to the end of its line.

    Args:
        text: Actions, separated by blanks or line breaks: ``F0 S0 B0@cuda:0/1``.
        name: The name that the schedule gets; its text does not contain one.

    Raises:
        ScheduleError: A word is not an action.
    """
    return Schedule(name, tuple(_action(word, place) for place, word in enumerate(_words(text))))


def parse_period(text: str, name: str = "text") -> Period:
    """Read a period as ``str`` prints it: one schedule for each window, with bars between them.

    Raises:
        ScheduleError: A word is not an action.
    """
    return Period(name, tuple(parse(window, name) for window in _COMMENT.sub("", text).split(BAR)))


def _words(text: str) -> list[str]:
    return _COMMENT.sub("", text).split()


def _action(word: str, place: int) -> Action:
    found = _WORD.fullmatch(word)
    if found is None or found["kind"] not in {kind.value for kind in Kind}:
        raise ScheduleError(
            f"Word {place} of the schedule, {word!r}, is not an action. Write one of the letters "
            f"{' '.join(kind.value for kind in Kind)} and a number: F1. A device and a stream may follow: B1@cuda:0, F1@cuda:0/2."
        )
    stream = None if found["stream"] is None else int(found["stream"])
    return Action(Kind(found["kind"]), int(found["index"]), _device(found["device"], word), stream)


def _device(name: str | None, word: str) -> str | None:
    if name is None:
        return None
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ScheduleError(
            f"{name!r} in {word!r} is not a device. Write it as torch.device does: cpu, cuda:0."
        ) from error
    return name
