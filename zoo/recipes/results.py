"""The results of a feed-forward experiment: a table, JSON, and pictures of the curves."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from dnifx.zoo.recipes.diagnosis import Look, Row, draw_looks
from dnifx.zoo.recipes.pictures import by_step, draw_curves, picture
from dnifx.zoo.recipes.report import empty_table, over_seeds, write_files


@dataclass(frozen=True)
class Point:
    """One point of a learning curve.

    Attributes:
        step: Training steps done.
        loss: Mean training loss over the steps since the point before.
        error: Validation error in percent.
    """

    step: int
    loss: float
    error: float


@dataclass(frozen=True)
class Run:
    """One variant trained from one seed.

    Attributes:
        seed: The seed.
        test_error: Test error in percent, after the last step.
        validation_error: Validation error in percent, after the last step.
        seconds: Time that the training steps took.
        curve: The learning curve.
        looks: The synthetic gradients against the gradients that they are fitted to.
        probes: The synthetic gradients against the true gradient, on validation examples.
        harms: The warnings.
    """

    seed: int
    test_error: float
    validation_error: float
    seconds: float
    curve: tuple[Point, ...]
    looks: tuple[Look, ...] = ()
    probes: tuple[Look, ...] = ()
    harms: tuple[str, ...] = ()


@dataclass(frozen=True)
class VariantResult:
    """The results of one variant.

    Attributes:
        name: The name in the table, such as ``cDNI``.
        gradient: What the hidden layers learned from.
        context: What the estimators saw beside the activation: ``none`` or ``label``.
        runs: One run for each seed.
        chosen: Every value of the variant, the tuned ones included.
        candidates: What validation chose from, if it chose, with the validation errors in percent.
    """

    name: str
    gradient: str
    context: str
    runs: tuple[Run, ...]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[tuple[Mapping[str, Any], float], ...] = ()

    @property
    def mean(self) -> float:
        """Mean test error over the seeds, in percent."""
        return statistics.fmean(run.test_error for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the test error over the seeds, in percent; None for one seed."""
        return statistics.stdev(run.test_error for run in self.runs) if len(self.runs) > 1 else None

    @property
    def validation(self) -> float:
        """Mean validation error over the seeds, in percent."""
        return statistics.fmean(run.validation_error for run in self.runs)


@dataclass(frozen=True)
class Results:
    """The results of an experiment, with all that is needed to run it again.

    Attributes:
        title: The network and the data set.
        command: The command line that runs the experiment.
        options: Every option, with the values that the recipe chose.
        variants: The variants, in the order of the options.
        device: The device, in words.
        versions: The versions of dnifx, torch, Python and the system.
        steps: Training steps of a run.
    """

    title: str
    command: str
    options: Mapping[str, Any]
    variants: tuple[VariantResult, ...]
    device: str
    versions: Mapping[str, str]
    steps: int

    def __rich__(self) -> Table:
        caption = over_seeds(self.steps, (run.seed for run in self.variants[0].runs))
        table = empty_table(self.title, ("trained by", "test error %", "validation error %", "steps/s"), caption)
        for variant in self.variants:
            spread = "" if variant.spread is None else f" ± {variant.spread:.2f}"
            speed = self.steps / statistics.fmean(run.seconds for run in variant.runs)
            table.add_row(variant.name, f"{variant.mean:.2f}{spread}", f"{variant.validation:.2f}", f"{speed:,.0f}")
        return table

    def to_folder(self, folder: Path) -> tuple[str, ...]:
        """Write ``results.json``, ``curves.png`` and, if there are looks, ``diagnostics.png``.

        Returns:
            The names of the files in ``folder``.

        Raises:
            DataError: matplotlib is not installed. The JSON is written first.
        """
        content = asdict(self)
        for variant, saved in zip(self.variants, content["variants"], strict=True):
            saved["test_error"] = {"mean": variant.mean, "standard_deviation": variant.spread, "unit": "percent"}
        files = write_files(folder, content, self._draw)
        rows = [
            Row(each.name, *zip(*((one.looks, one.probes) for one in each.runs), strict=True)) for each in self.variants
        ]
        rows = [row for row in rows if row.boundaries]
        if not rows:
            return files
        draw_looks(self.title, rows, folder / "diagnostics.png")
        return (*files, "diagnostics.png")

    def _draw(self, path: Path) -> None:
        with picture(path, self.title, (12, 4)) as figure:
            left, right = figure.subplots(1, 2)
            for axes, name, label in ((left, "loss", "training loss"), (right, "error", "validation error %")):
                draw_curves(
                    axes,
                    {each.name: by_step([run.curve for run in each.runs], "step", name) for each in self.variants},
                    log=name == "loss",
                    bottom=None if name == "loss" else 0.0,
                )
                axes.set(xlabel="steps", ylabel=label)
