"""The schedule language: actions as text and back."""

import re
from collections.abc import Iterable, Sequence

import torch

from dnifx.errors import ScheduleError
from dnifx.ir import BAR, SENDS, TRANSFERS, Action, Kind, Period, Schedule

_WORD = re.compile(
    r"(?P<kind>[A-Z]+(?:_[A-Z])?)(?P<index>\d+)(?:-(?P<lag>\d+))?"
    r"(?:@(?:rank(?P<rank>\d+)(?::|(?=[/<>]|$)))?(?P<device>[^\s/<>]+)?)?(?:/(?P<stream>\d+))?"
    r"(?:(?P<way>[<>])rank(?P<peer>\d+))?"
)
_COMMENT = re.compile(r"#[^\r\n]*")
_MEANINGS = {
    Kind.FORWARD: "forward of partition",
    Kind.BACKWARD: "backward of partition",
    Kind.UPDATE: "update of partition",
    Kind.INPUT: "synthetic input of partition",
    Kind.SYNTHESISE: "estimate at boundary",
    Kind.TARGET: "target of boundary",
    Kind.FIT: "fit at boundary",
    Kind.RENEW: "renew what others read of partition",
    Kind.SEND_VALUES: "send the values of partition",
    Kind.RECEIVE_VALUES: "receive the values of partition",
    Kind.SEND_TARGET: "send the target of boundary",
    Kind.RECEIVE_TARGET: "receive the target of boundary",
    Kind.SEND_GRADIENTS: "send the gradients of shared parameters of partition",
    Kind.RECEIVE_GRADIENTS: "receive the gradients of shared parameters of partition",
    Kind.SEND_WEIGHTS: "send the new values of shared parameters of partition",
    Kind.RECEIVE_WEIGHTS: "receive the new values of shared parameters of partition",
    Kind.SEND_COPIES: "send what the estimator copies at boundary",
    Kind.RECEIVE_COPIES: "receive what the estimator copies at boundary",
}
_ON_BOUNDARIES = frozenset(
    {
        Kind.SYNTHESISE,
        Kind.TARGET,
        Kind.FIT,
        Kind.SEND_TARGET,
        Kind.RECEIVE_TARGET,
        Kind.SEND_COPIES,
        Kind.RECEIVE_COPIES,
    }
)
_LATE = frozenset(
    {
        Kind.FORWARD,
        Kind.UPDATE,
        Kind.RENEW,
        Kind.TARGET,
        Kind.FIT,
        Kind.BACKWARD,
        Kind.RECEIVE_TARGET,
        Kind.RECEIVE_WEIGHTS,
    }
)


def on_partition(kind: Kind) -> bool:
    """Whether the index of such an action is a partition's; for the other kinds it is a boundary's."""
    return kind not in _ON_BOUNDARIES


def unplaced(action: Action) -> Action:
    """Return the action without its place and its lag. A transfer keeps its two ranks: they tell it from others."""
    if action.kind in TRANSFERS:
        return Action(action.kind, action.index, rank=action.rank, peer=action.peer)
    return action if action == (bare := Action(action.kind, action.index)) else bare


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
    if found is None or found["kind"] not in {kind.value for kind in Kind} or ("@" in word and not _has_place(found)):
        raise ScheduleError(
            f"Word {place} of the schedule, {word!r}, is not an action. Write one of {' '.join(kind.value for kind in Kind)} and a "
            "number: F1. A lag and a place may follow: M0-4, B1@cuda:0, F1@rank1:cuda:0/2."
        )
    stream, rank, peer, lag = (
        None if (text := found[name]) is None else int(text) for name in ("stream", "rank", "peer", "lag")
    )
    device = _device(found["device"], word)
    action = Action(Kind(found["kind"]), int(found["index"]), device, stream, rank, lag or 0, peer)
    _refuse_misplaced(action, found["way"], word)
    return action


def _has_place(found: re.Match[str]) -> bool:
    return found["rank"] is not None or found["device"] is not None


def _refuse_misplaced(action: Action, way: str | None, word: str) -> None:
    """Raise ScheduleError where a lag or another rank stands on an action that has none, or is missing."""
    if action.lag and action.kind not in _LATE:
        kinds = ", ".join(sorted(kind.value for kind in _LATE))
        raise ScheduleError(
            f"{word!r} has a lag, but only some kinds of actions are late ({kinds}). Remove -{action.lag}."
        )
    wanted = (">" if action.kind in SENDS else "<") if action.kind in TRANSFERS else None
    if way != wanted or (wanted is not None and action.rank in (None, action.peer)):
        raise ScheduleError(
            f"{word!r} does not say which ranks it joins. Write transfers as SEND_F0@rank0>rank1 and RECV_F0@rank1<rank0, and other "
            "actions without > and <."
        )


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
