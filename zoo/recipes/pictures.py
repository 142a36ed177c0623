"""Pictures of results. matplotlib is imported only when there is something to draw."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnifx.errors import DataError
from dnifx.zoo.recipes.outputs import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def picture(path: Path, title: str, size: tuple[float, float]) -> Iterator["Figure"]:
    """Give an empty figure to draw on. The file is written when the block ends.

    Args:
        path: The picture, a PNG.
        title: The text above the picture.
        size: Width and height, in inches.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"{path.name} needs matplotlib, which is not installed: pip install 'dnifx[zoo]'") from error
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    figure.suptitle(title)
    write_whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))


def draw_mean(
    axes: "Axes", values: Mapping[int, Sequence[float]], colour: Any, dashes: str = "-", label: str | None = None
) -> None:
    """Draw the mean over the runs as a line, and a band from the smallest value to the largest.

    Args:
        axes: Where to draw.
        values: The value of each run, by step.
        colour: Colour of line and band.
        dashes: Line style.
        label: Name in the legend.
    """
    means = [statistics.fmean(each) for each in values.values()]
    marker = "." if len(values) == 1 else ""
    axes.plot(list(values), means, color=colour, ls=dashes, marker=marker, label=label)
    if any(len(each) > 1 for each in values.values()):
        lowest, highest = ([bound(each) for each in values.values()] for bound in (min, max))
        axes.fill_between(list(values), lowest, highest, color=colour, alpha=0.15, linewidth=0)


def by_step(runs: Sequence[Sequence[object]], step: str, value: str) -> Mapping[int, Sequence[float]]:
    """Return an attribute of the points of all curves, by another attribute, their step.

    Args:
        runs: One curve, a sequence of points, for each run.
        step: Name of the attribute that holds a point's step.
        value: Name of the attribute to collect.
    """
    found: dict[int, list[float]] = {}
    for curve in runs:
        for point in curve:
            found.setdefault(getattr(point, step), []).append(getattr(point, value))
    return found
