"""From the arguments that an error text names to the options that a person at the command line can type."""

import ast
import re
from collections.abc import Mapping
from typing import Any

OPTIONS: Mapping[str, str] = {
    "args": "--input",
    "context": "--context",
    "cuts": "--cuts",
    "every": "--every",
    "gradient": "--gradient",
    "inputs": "--inputs",
    "kwargs": "--input",
    "lag": "--lag",
    "num_classes": "--num-classes",
    "overwrite": "--overwrite",
}
"""The option for each argument of ``dnifx.decouple`` and of what is called after it."""

_BOTH = re.compile(r"\bargs=(?:,| and| or) kwargs=(?![\w{'\"])")
_CALL = re.compile(r"\b(?:dnifx\.)?decouple\(\.\.\., ([^()]*)\)")
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\{[^{}]*\}|\.\.\.|True\b|None\b|-?\d+(?:\.\d+)?\b|(?![\w({\['\"])"
_ARGUMENT = re.compile(rf"(?<![\w.*-])({'|'.join(OPTIONS)})=({_VALUE})")


def in_options(text: str) -> str:
    """Return an error text in which arguments stand as options: ``--gradient zero`` for ``gradient='zero'``.

    An argument whose value is no literal, such as one in a quoted line of code, stays as it is.
    """
    text = _BOTH.sub("--input", _CALL.sub(r"\1", text))
    return _ARGUMENT.sub(lambda found: _option(OPTIONS[found[1]], found[2]), text)


def _option(option: str, value: str) -> str:
    """Write one option with its value, as a person types it."""
    if value in ("", "True"):
        return option
    try:
        return f"{option} {_typed(ast.literal_eval(value))}"
    except (SyntaxError, ValueError):
        return f"{option} {value}"


def _typed(value: Any) -> str:
    """Write a value as an option takes it: lists with commas, mappings with equals signs."""
    if value is ...:
        return "N"
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
