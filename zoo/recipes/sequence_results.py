"""The results of the sequence recipes: a table, JSON, and a picture of the curves."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dnifx.zoo.recipes.pictures import by_step, draw_curves, picture
from dnifx.zoo.recipes.report import empty_table, write_files
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.sequence_options import NAMES


@dataclass(frozen=True)
class SequenceRun:
    """One variant trained from one seed.

    Attributes:
        seed: The seed.
        score: The score of the best network.
        steps: Training steps.
        seconds: Time that the steps took.
        curve: The score at each measurement.
    """

    seed: int
    score: float
    steps: int
    seconds: float
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class SequenceVariant:
    """One way to join windows, with one window length.

    Attributes:
        key: The way, as ``--variants`` names it.
        unroll: Steps of a window.
        runs: One run for each seed.
    """

    key: str
    unroll: int
    runs: tuple[SequenceRun, ...] = ()

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{NAMES[self.key]} T={self.unroll}"

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return statistics.fmean(run.score for run in self.runs)


@dataclass(frozen=True)
class SequenceResults:
    """The results of an experiment, with all that is needed to run it again."""

    title: str
    unit: str
    command: str
    options: Mapping[str, Any]
    variants: tuple[SequenceVariant, ...]
    device: str
    versions: Mapping[str, str]

    def __rich__(self) -> Table:
        table = empty_table(self.title, ("variant", self.unit, "by seed", "steps", "steps/s"))
        for variant in self.variants:
            each = ", ".join(f"{run.score:.4g}" for run in variant.runs)
            speed = statistics.fmean(run.steps / max(run.seconds, 1e-9) for run in variant.runs)
            steps = ", ".join(dict.fromkeys(f"{run.steps:,}" for run in variant.runs))
            table.add_row(variant.name, f"{variant.mean:.4g}", each, steps, f"{speed:,.0f}")
        return table

    def to_folder(self, folder: Path) -> tuple[str, ...]:
        """Write ``results.json`` and ``curves.png`` into ``folder`` and return both names.

        Raises:
            DataError: matplotlib is not installed. The JSON is written first.
        """
        means = {variant.name: variant.mean for variant in self.variants}
        return write_files(folder, {**asdict(self), "means": means}, self._draw)

    def _draw(self, path: Path) -> None:
        with picture(path, self.title, (7, 4)) as figure:
            axes = figure.subplots()
            draw_curves(
                axes, {each.name: by_step([run.curve for run in each.runs], "step", "error") for each in self.variants}
            )
            axes.set(xlabel="steps", ylabel=self.unit)
