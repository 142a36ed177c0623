"""From what a user writes as a schedule to its source."""

import ast
import re
from collections.abc import Callable, Mapping
from inspect import Signature, signature
from typing import Any

from dnifx.errors import ScheduleError, nearest
from dnifx.ir import BAR, Period, Program, Schedule
from dnifx.schedules.chance import RandomOrder, Unlocked
from dnifx.schedules.lags import Lagged
from dnifx.schedules.language import looks_like_actions, read
from dnifx.schedules.orders import sequential_period
from dnifx.schedules.sources import Alternate, Backprop, FitEvery, Fixed, Phases, ScheduleSource, Sequential, WarmUp
from dnifx.schedules.validation import validate

NAMED: Mapping[str, Callable[..., ScheduleSource]] = {
    "sequential": Sequential,
    "phases": Phases,
    "backprop": Backprop,
    "random_order": RandomOrder,
    "unlocked": Unlocked,
    "warm_up": WarmUp,
    "fit_every": FitEvery,
    "alternate": Alternate,
    "lagged": Lagged,
}
_SPELLED = re.compile(r"(?P<name>\w+)\s*(?:\{(?P<options>[^{}]*)\})?")

Spec = str | Schedule | Period | ScheduleSource
"""What a user writes as a schedule."""


def resolve(spec: Spec, program: Program) -> ScheduleSource:
    """Return the source of the schedule that a user asked for, after checking its first step or period.

    Args:
        spec: A name, with options in braces where it has any (``sequential``, ``random_order{p=0.2,seed=1}``); a
            schedule or a period, as text or as a value; or a source. A schedule runs whole in every step. The windows
            of a period take turns. Partitions with different rates need a period, or ``sequential``.
        program: The program that it is for.

    Raises:
        ScheduleError: There is no such name or option, or the schedule is not valid for the program.
    """
    source = _source(spec)
    validate(_first(source, program), program, partial=source.partial)
    return source


def period_of(spec: Spec, program: Program) -> Schedule | Period:
    """Return what the schedule that a user asked for runs first: one step or, with rates, one period.

    Raises:
        ScheduleError: As ``resolve``.
    """
    return _first(resolve(spec, program), program)


def _first(source: ScheduleSource, program: Program) -> Schedule | Period:
    if isinstance(source, Fixed) and isinstance(source.schedule, Period):
        return source.schedule
    if all(partition.every == 1 for partition in program.partitions):
        return source.at(0, program)
    if isinstance(source, Sequential):
        return sequential_period(program)
    raise ScheduleError(
        f"The schedule {source.name!r} is for a single step, but the partitions fire at different rates "
        f"({', '.join(f'{each.name} every {each.every}' for each in program.partitions)}). Give 'sequential', or a period "
        f"with {BAR} between its windows: {sequential_period(program)}"
    )


def _source(spec: Spec) -> ScheduleSource:
    if isinstance(spec, str):
        return _source(read(spec)) if looks_like_actions(spec) else _named(spec.strip())
    if isinstance(spec, Schedule | Period):
        return Fixed(spec, partial=isinstance(spec, Period))
    if isinstance(spec, ScheduleSource) and not isinstance(spec, type):
        return spec
    raise ScheduleError(
        f"{type(spec).__name__} is not a schedule. Give a name ({', '.join(NAMED)}), a Schedule, a Period, the text of one, "
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
    options, make = _options(spelled["options"] or "", text), NAMED[spelled["name"]]
    try:
        return make(**signature(make).bind(**options).arguments)
    except TypeError as error:
        raise ScheduleError(
            f"The schedule {text!r}: {error}. Write {_example(spelled['name'], signature(make))}."
        ) from error


def _example(name: str, taken: Signature) -> str:
    """Write a schedule with all its options; one that has no default gets a value that works."""
    samples = {float: 0.5, int: 4}
    values = {
        each.name: samples.get(each.annotation, "...") if each.default is each.empty else each.default
        for each in taken.parameters.values()
        if each.name != "then"
    }
    return name + ("{" + ",".join(f"{option}={value}" for option, value in values.items()) + "}" if values else "")


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
            f"{text!r} in {whole!r} is neither a number nor True or False. Write options as p=0.2,seed=1."
        ) from error
