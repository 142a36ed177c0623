"""Several runs of recipes in one table: their variants with the mean and the spread over the seeds, and how they differ."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dnifx.errors import DataError, visible

FILE = "results.json"

NO_MEASURE = {"seed", "steps"}
"""Numbers of a run that are no measurement."""

NO_CHOICE = {"out", "log_dir"}
"""Options that change no result."""


@dataclass(frozen=True)
class Row:
    """One variant of one run.

    Attributes:
        number: Which of the runs it is, counted from 0.
        run: The name of the run's folder.
        variant: The variant's name.
        seeds: How many seeds it was trained from.
        measures: The mean over the seeds, and the standard deviation, of each measurement.
    """

    number: int
    run: str
    variant: str
    seeds: int
    measures: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other; it shows itself as a table.

    Attributes:
        rows: One for each variant of each run.
        options: The options that all runs have and in which they differ, with each run's value.
    """

    rows: tuple[Row, ...]
    options: Mapping[str, tuple[Any, ...]]

    def __rich__(self) -> RenderableType:
        names = list(dict.fromkeys(name for row in self.rows for name in row.measures))
        table = Table("run", "variant", box=None, pad_edge=False)
        for name in ("seeds", *names):
            table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
        for row in self.rows:
            cells = [_shown(row.measures.get(name), row.seeds) for name in names]
            table.add_row(Text(visible(row.run)), Text(visible(row.variant)), str(row.seeds), *cells)
        differences = [
            Text(visible(f"{name.replace('_', '-')}: {', '.join(map(str, values))}"))
            for name, values in self.options.items()
        ]
        parts: list[RenderableType] = [table]
        if differences:
            parts += ["", Text("options that differ, in the order of the runs"), *differences]
        return Group(*parts)


def compare(folders: Sequence[Path]) -> Comparison:
    """Read the results of runs and put them beside each other.

    Args:
        folders: The folders that recipes wrote to (``--out``), or their ``results.json``.

    Raises:
        DataError: A folder has no results, or they are not those of a recipe with variants.
    """
    read = [_read(folder) for folder in folders]
    rows = [row for number, folder in enumerate(folders) for row in _rows(number, folder, read[number])]
    options = [content.get("options", {}) for content in read]
    shared = set(options[0]).intersection(*options[1:]) - NO_CHOICE
    values = {name: tuple(each[name] for each in options) for name in options[0] if name in shared}
    return Comparison(
        tuple(rows), {name: found for name, found in values.items() if len({str(each) for each in found}) > 1}
    )


def _read(folder: Path) -> dict[str, Any]:
    """Read one run's results."""
    path = folder / FILE if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; name a folder that a recipe wrote to by --out"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}; name a folder that a recipe wrote to by --out") from error
    variants = content.get("variants", content.get("arms")) if isinstance(content, dict) else None
    if not isinstance(variants, list) or not all(isinstance(each, dict) and each.get("runs") for each in variants):
        raise DataError(
            f"{path} holds no variants with runs, so there is nothing to compare; name the folder of another recipe"
        )
    return {**content, "variants": variants}


def _rows(number: int, folder: Path, content: Mapping[str, Any]) -> Iterator[Row]:
    """Sum up each variant of one run."""
    place = (folder if folder.is_dir() else folder.parent).resolve()
    for variant in content["variants"]:
        runs = variant["runs"]
        told = [
            f"{key}={value}" for key, value in variant.items() if key not in ("variant", "arm") and is_number(value)
        ]
        name = variant.get("name") or " ".join([str(variant.get("variant", variant.get("arm", "-"))), *told])
        names = [key for key, value in runs[0].items() if key not in NO_MEASURE and is_number(value)]
        values = {key: [run[key] for run in runs if is_number(run.get(key))] for key in names}
        measures = {key: (statistics.fmean(each), _spread(each)) for key, each in values.items()}
        yield Row(number, place.name, str(name), len(runs), measures)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation over the seeds; that of one seed is 0."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def is_number(value: Any) -> bool:
    """Whether a value is a number, and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(measure: tuple[float, float] | None, seeds: int) -> str:
    """Write a mean with its standard deviation; one seed has no spread."""
    if measure is None:
        return "-"
    mean, spread = measure
    return f"{mean:.4g}" + (f" ± {spread:.2g}" if seeds > 1 else "")
