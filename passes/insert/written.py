"""What a user would write for an option."""

from dataclasses import fields, is_dataclass
from typing import Any


def as_written(factory: Any) -> str:
    """Return a factory, or one of its options, as a user would write it: with the first option and all that are not defaults."""
    if isinstance(factory, type):
        return factory.__name__
    if not is_dataclass(factory):
        return str(getattr(factory, "__name__", type(factory).__name__)) if callable(factory) else repr(factory)
    options = ", ".join(
        f"{option.name}={as_written(getattr(factory, option.name))}"
        for index, option in enumerate(fields(factory))
        if index == 0 or getattr(factory, option.name) != option.default
    )
    return f"{type(factory).__name__}({options})"
