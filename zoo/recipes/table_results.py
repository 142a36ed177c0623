"""The results of the recipe ``table``: a table, JSON, and a picture of the curves."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table as RichTable

from dnifx.zoo.recipes.pictures import by_step, draw_curves, picture
from dnifx.zoo.recipes.report import empty_table, over_seeds, write_files
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.table_costs import Costs
from dnifx.zoo.recipes.table_options import NAMES


@dataclass(frozen=True)
class TableRun:
    """One variant trained from one seed.

    Attributes:
        seed: The seed.
        test: The score on the test part, after the last step.
        validation: The score on the validation part, after the last step.
        seconds: Time that the training steps took.
        curve: The training loss and the score on the validation part.
        cosines: By cut, the cosine between what the partition before it learns from and its true gradient, over all its
            parameters, after the last step. Empty for a late gradient, which is that of another step.
    """

    seed: int
    test: float
    validation: float
    seconds: float
    curve: tuple[Point, ...]
    cosines: Mapping[str, float]


@dataclass(frozen=True)
class TableVariant:
    """One way to learn.

    Attributes:
        key: The way, as ``--variants`` names it.
        runs: One run for each seed.
        costs: What a training step costs.
        removed: The locks of backpropagation that it removes, by the number of partitions that are free of each.
        chosen: Its rates.
        candidates: What validation chose from, if it chose, with the scores.
    """

    key: str
    runs: tuple[TableRun, ...]
    costs: Costs
    removed: Mapping[str, int]
    chosen: Mapping[str, Any]
    candidates: tuple[tuple[Mapping[str, Any], float], ...] = ()

    @property
    def name(self) -> str:
        """The name in tables."""
        return NAMES[self.key]

    @property
    def scores(self) -> list[float]:
        """The score of each seed on the test part."""
        return [run.test for run in self.runs]

    @property
    def cosine(self) -> float | None:
        """The cosine with the true gradient, averaged over seeds and cuts; None where there is none."""
        found = [cosine for run in self.runs for cosine in run.cosines.values()]
        return statistics.fmean(found) if found else None


@dataclass(frozen=True)
class TableResults:
    """The results of an experiment, with all that is needed to run it again.

    Attributes:
        title: Network, data and cuts.
        unit: What a score is; lower is better.
        relative: Whether gaps are ratios, in percent.
        command: The command line that runs the experiment.
        options: Every option, with what the model chose.
        variants: The variants, in the order of the options.
        device: The device, in words.
        versions: The versions of dnifx, torch, Python and the system.
        steps: Training steps of a run.
    """

    title: str
    unit: str
    relative: bool
    command: str
    options: Mapping[str, Any]
    variants: tuple[TableVariant, ...]
    device: str
    versions: Mapping[str, str]
    steps: int

    def gaps(self, variant: TableVariant) -> list[float] | None:
        """Return by how much each seed is worse than backpropagation from the same seed; None without backpropagation."""
        reference = next((each for each in self.variants if each.key == "backprop"), None)
        if reference is None:
            return None
        pairs = zip(variant.scores, reference.scores, strict=True)
        return [100 * (own / other - 1) if self.relative else own - other for own, other in pairs]

    def __rich__(self) -> RichTable:
        caption = over_seeds(self.steps, (run.seed for run in self.variants[0].runs))
        gap = "gap to backprop" + (", %" if self.relative else "")
        columns = ("trained by", f"test {self.unit}", gap, "cosine", "FLOPs a step", "held", "locks removed", "steps/s")
        table = empty_table(self.title, columns, caption)
        for variant in self.variants:
            gaps = self.gaps(variant)
            speed = self.steps / max(statistics.fmean(run.seconds for run in variant.runs), 1e-9)
            table.add_row(
                variant.name,
                spread(variant.scores),
                "" if gaps is None or variant.key == "backprop" else spread(gaps, "+"),
                "" if variant.cosine is None else f"{variant.cosine:.2f}",
                decimal(variant.costs.flops).removesuffix("B") + "FLOP",
                decimal(variant.costs.held_bytes),
                ", ".join(f"{lock} {count}" for lock, count in variant.removed.items()) or "none",
                f"{speed:,.1f}",
            )
        return table

    def to_folder(self, folder: Path) -> tuple[str, ...]:
        """Write ``results.json`` and ``curves.png`` into ``folder`` and return both names.

        Raises:
            DataError: matplotlib is not installed. The JSON is written first.
        """
        content = asdict(self)
        for variant, saved in zip(self.variants, content["variants"], strict=True):
            saved["gap"] = self.gaps(variant)
        return write_files(folder, content, self._draw)

    def _draw(self, path: Path) -> None:
        with picture(path, self.title, (12, 4)) as figure:
            left, right = figure.subplots(1, 2)
            for axes, name, label in ((left, "loss", "training loss"), (right, "error", f"validation {self.unit}")):
                draw_curves(
                    axes,
                    {each.name: by_step([run.curve for run in each.runs], "step", name) for each in self.variants},
                    log=True,
                )
                axes.set(xlabel="steps", ylabel=label)


def spread(values: list[float], sign: str = "") -> str:
    """Return the mean of some values, and their standard deviation if there are several.

    >>> spread([1.0, 2.0, 3.0], "+"), spread([0.5])
    ('+2.00 ± 1.00', '0.50')
    """
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
