"""The results of the recipe ``two-clocks``: a table, JSON, and a picture of the errors."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dnifx.zoo.recipes.pictures import by_step, draw_curves, picture
from dnifx.zoo.recipes.report import empty_table, write_files
from dnifx.zoo.recipes.two_clocks_options import NAMES


@dataclass(frozen=True)
class ClockPoint:
    """One point of the curves.

    Attributes:
        digits: Digits that each stream has shown so far. The paper calls this data time.
        loss: Mean training loss of the slow network over the periods since the point before.
        odd: Test error of the fast network's counts, in percent of the windows.
        threes: Test error of the slow network's counts, in percent of the periods.
    """

    digits: int
    loss: float
    odd: float
    threes: float


@dataclass(frozen=True)
class ClockRun:
    """One variant trained from one seed: the errors of the last measurement, and the curves."""

    seed: int
    odd: float
    threes: float
    seconds: float
    curve: tuple[ClockPoint, ...]


@dataclass(frozen=True)
class ClockVariant:
    """One way to train both networks, as ``--variants`` names it, with one run for each seed."""

    key: str
    runs: tuple[ClockRun, ...] = ()

    @property
    def name(self) -> str:
        """The name in tables."""
        return NAMES[self.key]


@dataclass(frozen=True)
class ClockResults:
    """The results of an experiment, with all that is needed to run it again."""

    title: str
    command: str
    options: Mapping[str, Any]
    variants: tuple[ClockVariant, ...]
    device: str
    versions: Mapping[str, str]

    def __rich__(self) -> Table:
        digits = self.variants[0].runs[0].curve[-1].digits
        seeds = ", ".join(str(run.seed) for run in self.variants[0].runs)
        columns = ("trained by", "A, odd digits, error %", "B, threes, error %", "A at 10% by", "digits/s")
        table = empty_table(self.title, columns, f"test errors after {digits:,} digits a stream; seeds {seeds}")
        for variant in self.variants:
            odd, threes = (statistics.fmean(getattr(run, name) for run in variant.runs) for name in ("odd", "threes"))
            reached = [first_at(run.curve, 10.0) for run in variant.runs]
            speed = statistics.fmean(digits / max(run.seconds, 1e-9) for run in variant.runs)
            table.add_row(variant.name, f"{odd:.2f}", f"{threes:.2f}", mean_of(reached), f"{speed:,.0f}")
        return table

    def to_folder(self, folder: Path) -> tuple[str, ...]:
        """Write ``results.json`` and ``curves.png`` into ``folder`` and return both names.

        Raises:
            DataError: matplotlib is not installed. The JSON is written first.
        """
        return write_files(folder, asdict(self), self._draw)

    def _draw(self, path: Path) -> None:
        with picture(path, self.title, (12, 4)) as figure:
            titles = ("A: odd digits in the last window", "B: threes in the last period")
            for axes, name, title in zip(figure.subplots(1, 2), ("odd", "threes"), titles, strict=True):
                draw_curves(
                    axes,
                    {each.name: by_step([run.curve for run in each.runs], "digits", name) for each in self.variants},
                    bottom=0.0,
                )
                axes.set(xlabel="digits a stream (data time)", ylabel="test error %", title=title)


def first_at(curve: Sequence[ClockPoint], error: float) -> int | None:
    """Return after how many digits the fast network's error first was ``error`` or less, or None."""
    return next((point.digits for point in curve if point.odd <= error), None)


def mean_of(places: Sequence[int | None]) -> str:
    """Return the mean of the places that are not None, as text, with their number if some are."""
    known = [place for place in places if place is not None]
    if not known:
        return "never"
    missing = f" ({len(known)} of {len(places)})" if len(known) < len(places) else ""
    return f"{statistics.fmean(known):,.0f}{missing}"
