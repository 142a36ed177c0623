"""Several runs of recipes in one picture: a measurement of each, over the option in which they differ if that is one number."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnifx.errors import DataError, visible
from dnifx.zoo.recipes.comparison import Comparison, Row, is_number
from dnifx.zoo.recipes.pictures import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_RESULT = {"seconds"}
"""Measurements that say nothing of what was learned."""

WIDTH, HEIGHT, ROW = 7.0, 4.2, 0.32
"""The size of a picture in inches, and what each further row of a list adds to its height."""


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw the first measurement that all runs have; bars are one standard deviation over the seeds.

    Args:
        comparison: The runs.
        path: The picture, a PNG.

    Raises:
        DataError: The runs share no measurement, the picture cannot be written, or matplotlib is not installed.
    """
    rows = comparison.rows
    shared = [name for name in rows[0].measures if all(name in row.measures for row in rows) and name not in NO_RESULT]
    if not shared:
        raise DataError("these runs share no measurement, so there is no picture of them; compare runs of one recipe")
    name, values = varied(comparison)
    high = HEIGHT if name else max(HEIGHT / 2, ROW * (len(rows) + 3))
    title = f"{shared[0]} by {name}" if name else shared[0]
    with picture(path, title.replace("_", " "), (WIDTH, high)) as figure:
        axes = figure.subplots()
        if name:
            draw_over(axes, rows, values, shared[0])
            axes.set_xlabel(name.replace("_", " "))
            axes.set_ylabel(shared[0].replace("_", " "))
        else:
            draw_list(axes, rows, shared[0])


def varied(comparison: Comparison) -> tuple[str, list[float]]:
    """Return the one option in which the runs differ, with each run's value, if all are numbers and each another; else no name."""
    if len(comparison.options) == 1:
        ((name, found),) = comparison.options.items()
        values = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in found]
        if all(map(is_number, values)) and len(set(values)) == len(values):
            return name, values
    return "", []


def draw_over(axes: "Axes", rows: tuple[Row, ...], values: list[float], measure: str) -> None:
    """Draw a line for each variant, with its name at the end."""
    places = {value: place for place, value in enumerate(sorted(values))}
    for variant in dict.fromkeys(row.variant for row in rows):
        own = sorted((values[row.number], *row.measures[measure]) for row in rows if row.variant == variant)
        at, means, spreads = zip(*((places[value], mean, spread) for value, mean, spread in own), strict=True)
        line: Any = axes.errorbar(at, means, spreads, marker="o", ms=4, capsize=3)
        end = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "color": line[0].get_color()}
        axes.annotate(visible(variant), (at[-1], means[-1]), annotation_clip=False, **end)
    axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])
    axes.margins(x=0.12)
    axes.grid(axis="y", alpha=0.3)


def draw_list(axes: "Axes", rows: tuple[Row, ...], measure: str) -> None:
    """Draw a line of its own for each variant of each run, the first on top."""
    means, spreads = zip(*(row.measures[measure] for row in rows), strict=True)
    axes.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", ms=5, capsize=3)
    axes.set_yticks(range(len(rows)), [visible(f"{row.run}: {row.variant}") for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
