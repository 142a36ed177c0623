"""From what a user writes for a schedule to the source of it."""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from dnifx.errors import ScheduleError, nearest
from dnifx.ir import Program, Schedule
from dnifx.schedules.chance import random_order, unlocked
from dnifx.schedules.language import looks_like_actions, parse
from dnifx.schedules.sources import Backprop, ScheduleSource, Sequential, alternate, fit_every, fixed, warm_up
from dnifx.schedules.validation import validate

NAMED: Mapping[str, Callable[..., ScheduleSource]] = {
    "sequential": Sequential,
    "backprop": Backprop,
    "random_order": random_order,
    "unlocked": unlocked,
    "warm_up": warm_up,
    "fit_every": fit_every,
    "alternate": alternate,
}
_SPELLED = re.compile(r"(?P<name>\w+)\s*(?:\{(?P<options>[^{}]*)\})?")


def resolve(spec: str | Schedule | ScheduleSource, program: Program) -> ScheduleSource:
    """Return the source of the schedule that a user asked for, after checking its first step.

    Args:
        spec: A name, with options in braces where it has any (``sequential``, ``random_order{p=0.2,seed=1}``); a
            schedule, as text or as a value, that every step runs whole; or a source.
        program: The program that it is for.

    Raises:
        ScheduleError: There is no such name or option, or the schedule is not valid for the program.
    """
    source = _source(spec)
    validate(source.at(0, program), program, partial=source.partial)
    return source


def _source(spec: str | Schedule | ScheduleSource) -> ScheduleSource:
    if isinstance(spec, Schedule):
        return fixed(spec)
    if isinstance(spec, str):
        return fixed(parse(spec)) if looks_like_actions(spec) else _named(spec.strip())
    if isinstance(spec, ScheduleSource):
        return spec
    raise ScheduleError(
        f"{type(spec).__name__} is no schedule. Give a name ({', '.join(NAMED)}), a Schedule, its text, "
        "or an object with name, partial, at(step, program), state_dict and load_state_dict."
    )


def _named(text: str) -> ScheduleSource:
    spelled = _SPELLED.fullmatch(text)
    if spelled is None or spelled["name"] not in NAMED:
        name = text if spelled is None else spelled["name"]
        raise ScheduleError(
            f"There is no schedule {name!r}; nearest: {nearest(name, NAMED)}. "
            "Write a name, name{option=value,...}, or actions: F0 S0 B0 U0."
        )
    options = _options(spelled["options"] or "", text)
    try:
        return NAMED[spelled["name"]](**options)
    except TypeError as error:
        raise ScheduleError(f"The options of {text!r} are not those of {spelled['name']}: {error}.") from error


def _options(text: str, whole: str) -> dict[str, Any]:
    found = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, value = item.partition("=")
        found[name.strip()] = _source(value.strip()) if name.strip() == "then" else _value(value.strip(), whole)
    return found


def _value(text: str, whole: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ScheduleError(
            f"{text!r} in {whole!r} is no number or truth value. Write options as p=0.2,seed=1."
        ) from error
