"""How a recipe reports its results: a table on the console, and files in a folder."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from dnifx.zoo.recipes.outputs import write_whole


class Results(Protocol):
    """The results of an experiment."""

    def __rich__(self) -> Table:
        """Return them as a table."""

    def to_folder(self, folder: Path) -> tuple[str, ...]:
        """Write them into ``folder`` and return the names of the files."""


def report(results: Results, out: Path | None, console: Console) -> None:
    """Print the results and, if ``out`` is given, write their files there."""
    console.print(results)
    if out is not None:
        *files, last = results.to_folder(out)
        console.print(f"{', '.join(files)} and {last} are in {out}")


def write_files(folder: Path, content: Any, draw: Callable[[Path], None], indent: int | None = 2) -> tuple[str, ...]:
    """Write ``content`` to ``results.json``, let ``draw`` make ``curves.png``; return both names.

    Raises:
        DataError: matplotlib is not installed. The JSON is written first.
    """
    text = json.dumps(content, indent=indent, default=str) + "\n"
    write_whole(folder / "results.json", lambda part: part.write_text(text))
    draw(folder / "curves.png")
    return ("results.json", "curves.png")


def over_seeds(steps: int, seeds: Iterable[int]) -> str:
    """Return a table's caption: after how many steps, and over which seeds.

    >>> over_seeds(1500, [0, 1])
    'after 1,500 steps; seeds 0, 1, mean ± standard deviation'
    """
    listed = ", ".join(map(str, seeds))
    return f"after {steps:,} steps; seeds {listed}" + (", mean ± standard deviation" if "," in listed else "")


def empty_table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    """Return a table with a first column for names and other columns for numbers."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table
