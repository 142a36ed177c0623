"""Mistakes that people make, and the error that each gets: ``docs/errors.md``. ``python -m tests.mistakes`` writes that page."""

import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from dnifx.errors import DnifxError
from tests.mistakes import commands, decoupling, saving, training

PAGE = Path(__file__).parent.parent.parent / "docs" / "errors.md"

Mistakes = Mapping[str, Callable[[], object]]

SECTIONS: Mapping[str, Mistakes] = {
    "What `dnifx.decouple` is given": decoupling.MISTAKES,
    "What a trainer is given": training.TRAINER,
    "Schedules": training.SCHEDULES,
    "Steps and calls of the net": training.STEPS,
    "Saved states and folders": saving.MISTAKES,
    "The command line": commands.MISTAKES,
}

HEAD = """# Errors

This page lists mistakes, and what dnifx says to each. Every error is a `DnifxError`: its text says
what is wrong, where, and what to do. `python -m tests.mistakes` writes this page, and a test compares
it with what is raised.

Where a call has a wrong number of arguments, or an unknown one, Python raises its own `TypeError`.
"""


@cache
def error_of(title: str, name: str) -> DnifxError:
    """Return the error that a mistake gets.

    Raises:
        AssertionError: It gets none.
    """
    torch.manual_seed(0)
    mistake = SECTIONS[title][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = mistake()
        except DnifxError as error:
            return error
    raise AssertionError(f"no error; it gave {made!r}")


def shown(error: DnifxError) -> str:
    """Return an error's text on one line, without what differs from run to run."""
    text = re.sub(r"0x[0-9a-f]+", "0x...", str(error))
    text = re.sub(r"/\S*?/dnifx-mistakes\w*", "/folder", text)
    text = re.sub(r" \(looked in [^)]*\)", "", text)
    text = re.sub(r"(\w+\.py):\d+", r"\1", text)
    return " ".join(text.split()).replace("|", r"\|")


def page() -> str:
    """Return the page of all mistakes."""
    lines = [HEAD]
    for title, mistakes in SECTIONS.items():
        lines += [f"## {title}", "", "| mistake | error |", "|---|---|"]
        for name in mistakes:
            error = error_of(title, name)
            lines.append(f"| {name} | **{type(error).__name__}** {shown(error)} |")
        lines.append("")
    return "\n".join(lines)
