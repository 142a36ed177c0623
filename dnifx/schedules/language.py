"""The schedule language: actions as text and back."""

import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from dnifx.errors import ScheduleError
from dnifx.ir import BAR, Action, Kind, Period, Schedule

_WORD = re.compile(r"(?P<kind>[A-Z])(?P<index>\d+)(?:@(?P<device>[^\s/]+))?(?:/(?P<stream>\d+))?")
_COMMENT = re.compile(r"#.*")
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
    """Whether actions of this kind are numbered by partition; the others are numbered by boundary."""
    return kind in _ON_PARTITIONS


def unplaced(action: Action) -> Action:
    """Return the action without its device and stream: what it does, wherever it does it."""
    return action if action.device is None and action.stream is None else Action(action.kind, action.index)


def listed(actions: Iterable[Action]) -> str:
    """Return actions as text for an error, sorted: ``F0, S0``."""
    return ", ".join(map(str, sorted(actions, key=lambda action: (action.index, action.kind.value))))


def described(action: Action, boundaries: Sequence[str]) -> str:
    """Return an action with its meaning: ``T0 (target of boundary 0, 'layer1')``.

    Args:
        action: The action.
        boundaries: Names of the program's boundaries.
    """
    named = not on_partition(action.kind) and action.index < len(boundaries)
    name = f", {boundaries[action.index]!r}" if named else ""
    return f"{unplaced(action)} ({_MEANINGS[action.kind]} {action.index}{name})"


def looks_like_actions(text: str) -> bool:
    """Whether the text begins as a schedule does, and not as the name of one does."""
    words = _words(text)
    return _WORD.fullmatch(next(words, "")) is not None


def parse(text: str, name: str = "text") -> Schedule:
    """Read a schedule as ``str`` prints it; ``#`` begins a comment that runs to the end of its line.

    Args:
        text: Actions between blanks or line ends: ``F0 S0 B0@cuda:0/1``.
        name: The name of the schedule; the text does not hold it.

    Raises:
        ScheduleError: A word is not an action.
    """
    return Schedule(name, tuple(_action(word, place) for place, word in enumerate(_words(text))))


def parse_period(text: str, name: str = "text") -> Period:
    """Read a period as ``str`` prints it: schedules with bars between them.

    Raises:
        ScheduleError: A word is not an action.
    """
    return Period(name, tuple(parse(part, name) for part in text.split(BAR)))


def _words(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from _COMMENT.sub("", line).split()


def _action(word: str, place: int) -> Action:
    found = _WORD.fullmatch(word)
    if found is None or found["kind"] not in {kind.value for kind in Kind}:
        raise ScheduleError(
            f"Word {place} of the schedule, {word!r}, is not an action. Expected one of the letters "
            f"{' '.join(kind.value for kind in Kind)}, a number, and if wanted a device and a stream: "
            "F1, B1@cuda:0, F1@cuda:0/2."
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
            f"{word!r} names no device: {name!r}. Write it as torch.device does: cpu, cuda:0."
        ) from error
    return name
