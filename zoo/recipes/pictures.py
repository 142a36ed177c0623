"""Pictures of results. matplotlib is imported only when there is something to draw."""

import math
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


def draw_mean(axes: "Axes", values: Mapping[int, Sequence[float]], colour: Any, dashes: str = "-") -> None:
    """Draw the mean over the runs as a line, and a band from the smallest value to the largest.

    Args:
        axes: Where to draw.
        values: The value of each run, by step.
        colour: Colour of line and band.
        dashes: Line style.
    """
    means = [statistics.fmean(each) for each in values.values()]
    marker = "." if len(values) == 1 else ""
    axes.plot(list(values), means, color=colour, ls=dashes, marker=marker)
    if any(len(each) > 1 for each in values.values()):
        lowest, highest = ([bound(each) for each in values.values()] for bound in (min, max))
        axes.fill_between(list(values), lowest, highest, color=colour, alpha=0.15, linewidth=0)


def draw_curves(
    axes: "Axes",
    curves: Mapping[str, Mapping[int, Sequence[float]]],
    log: bool = False,
    bottom: float | None = None,
) -> None:
    """Draw the mean of each variant with its band, and the variant's name at the end of its line.

    Args:
        axes: Where to draw; the limits of its y axis are kept, if they were set.
        curves: The value of each run, by step, by the variant's name.
        log: Whether the y axis is logarithmic.
        bottom: Where the y axis begins; by default where the curves do.
    """
    shown = {name: values for name, values in curves.items() if values}
    for place, values in enumerate(shown.values()):
        draw_mean(axes, values, *_look(place))
    axes.grid(alpha=0.3)
    if bottom is not None:
        axes.set_ylim(bottom, axes.get_ylim()[1])
    if log:
        scale_log(axes)
    ends = {name: statistics.fmean(values[max(values)]) for name, values in shown.items()}
    for (name, height), place in zip(apart(axes, ends).items(), range(len(ends)), strict=True):
        at: Any = {"xycoords": "axes fraction", "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (1.0, height), annotation_clip=False, fontsize="small", color=_look(place)[0], **at)


def _look(place: int) -> tuple[str, str]:
    """Return the colour and the line style of a variant."""
    return f"C{place % 10}", ("-", "--", ":", "-.")[place // 10 % 4]


LINE = 0.06
"""Height of a line of text, as a share of the height of the axes."""


def apart(axes: "Axes", ends: Mapping[str, float]) -> dict[str, float]:
    """Return where names stand at the right of the axes, as shares of its height: near where their lines end, and apart.

    Args:
        axes: Has the limits of the y axis.
        ends: Where each line ends, by name.
    """
    axes.get_ylim()  # the limits are known from here on
    shares = axes.transAxes.inverted().transform
    wanted = {name: float(shares(axes.transData.transform((0.0, end)))[1]) for name, end in ends.items()}
    found: dict[str, float] = {}
    lowest = 0.0
    for name in sorted(wanted, key=lambda each: wanted[each]):
        found[name] = lowest = max(wanted[name], lowest)
        lowest += LINE
    highest = 1.0
    for name in reversed(list(found)):  # what would stand above the axes moves down, and what is below it too
        found[name] = highest = min(found[name], highest)
        highest -= LINE
    return {name: found[name] for name in ends}


def scale_log(axes: "Axes") -> None:
    """Make the y axis logarithmic, with plain numbers at ticks that are easy to read, four or more."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low <= step * 10.0**decade <= high]
    if len(ticks) < 4:
        ticks = [each for each in MaxNLocator(6).tick_values(low, high) if each > 0.0 and low <= each <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


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
