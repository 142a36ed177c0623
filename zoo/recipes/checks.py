"""Checks of option values, and of the losses of a run, that all recipes share."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dnifx.errors import LossError, OptionError
from dnifx.zoo.recipes.base import flag


def check_least(options: object, least: Mapping[str, int]) -> None:
    """Raise OptionError if a field, or one of its several values, is below its minimum."""
    for name, value in _values(options, least):
        if value < least[name]:
            raise OptionError(f"{flag(name)}: got {value}, expected {least[name]} or more")


def check_rates(options: object, names: Iterable[str]) -> None:
    """Raise OptionError if a learning rate is 0 or less."""
    for name, value in _values(options, names):
        if value <= 0:
            raise OptionError(f"{flag(name)}: got {value}, expected a rate above 0, such as 1e-3")


def check_given(options: object, names: Iterable[str]) -> None:
    """Raise OptionError if an option of several values has none."""
    for name in names:
        if not getattr(options, name):
            raise OptionError(f"{flag(name)}: got no value, expected one or more; leave it out for the default")


def check_finite(loss: float, step: int) -> float:
    """Return the training loss, or raise LossError if it is infinite or not a number."""
    if not math.isfinite(loss):
        raise LossError(f"the training loss is {loss} by step {step}, expected a finite number; give a lower --lr")
    return loss


def _values(options: object, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield each number in the fields, with its field. None and empty fields yield nothing."""
    for name in names:
        value = getattr(options, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None:
                yield name, each
