"""What an experiment found: a table for people, JSON for programs, and a picture of the curves."""

import json
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from dnifx.zoo.recipes.diagnosis import Look, Row, draw_looks
from dnifx.zoo.recipes.pictures import picture
from dnifx.zoo.recipes.store import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Point:
    """One place on a learning curve.

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
    """One arm trained from one seed.

    Attributes:
        seed: The seed.
        test_error: Test error in percent, after the last step.
        validation_error: Validation error in percent, after the last step.
        seconds: Time that its training steps took.
        curve: Its learning curve.
        looks: How good its synthetic gradients were, against the gradients that they are fitted to.
        probes: The same against the true gradient, on validation examples.
        harms: What was warned of.
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
class ArmResult:
    """One arm of the experiment.

    Attributes:
        name: As the table shows it: ``cDNI``.
        gradient: What its hidden layers learned from.
        context: What its estimators saw beside the activation: ``none`` or ``label``.
        runs: One for each seed.
        chosen: The arm in full: layers, position, update probability, and what was tuned.
        candidates: Where validation chose, what it chose from, and each one's validation error in percent.
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
    """All that an experiment found, and what is needed to run it again.

    Attributes:
        title: What was trained on what.
        command: The command line that ran it.
        options: Every option, with what the recipe chose.
        arms: The arms, in the order of the options.
        device: The device it ran on, in words.
        versions: Of what it ran on.
        steps: Training steps of a run.
    """

    title: str
    command: str
    options: Mapping[str, Any]
    arms: tuple[ArmResult, ...]
    device: str
    versions: Mapping[str, str]
    steps: int

    def __rich__(self) -> Table:
        seeds = ", ".join(str(run.seed) for run in self.arms[0].runs)
        caption = f"after {self.steps:,} steps; seeds {seeds}" + (", mean ± standard deviation" if "," in seeds else "")
        table = Table(title=self.title, caption=caption, title_justify="left", caption_justify="left")
        table.add_column("trained by")
        for column in ("test error %", "validation error %", "steps/s"):
            table.add_column(column, justify="right")
        for arm in self.arms:
            spread = "" if arm.spread is None else f" ± {arm.spread:.2f}"
            speed = self.steps / statistics.fmean(run.seconds for run in arm.runs)
            table.add_row(arm.name, f"{arm.mean:.2f}{spread}", f"{arm.validation:.2f}", f"{speed:,.0f}")
        return table

    def to_json(self) -> str:
        """Return everything as JSON, with each arm's mean and spread beside its runs."""
        content = asdict(self)
        for arm, saved in zip(self.arms, content["arms"], strict=True):
            saved["test_error"] = {"mean": arm.mean, "standard_deviation": arm.spread, "unit": "percent"}
        return json.dumps(content, indent=2, default=str) + "\n"

    def to_folder(self, folder: Path) -> tuple[str, ...]:
        """Write ``results.json``, ``curves.png`` and, where synthetic gradients were looked at, ``diagnostics.png``.

        Returns:
            The names of the files in ``folder``.

        Raises:
            DataError: Where matplotlib, which draws the picture, is absent; the JSON is written first.
        """
        write_whole(folder / "results.json", lambda part: part.write_text(self.to_json()))
        self._draw(folder / "curves.png")
        rows = [Row(arm.name, *zip(*((run.looks, run.probes) for run in arm.runs), strict=True)) for arm in self.arms]
        seen = [row for row in rows if row.boundaries]
        if seen:
            draw_looks(self.title, seen, folder / "diagnostics.png")
        return ("results.json", "curves.png", *["diagnostics.png"][: len(seen)])

    def _draw(self, path: Path) -> None:
        with picture(path, self.title, (10, 4)) as figure:
            left, right = figure.subplots(1, 2)
            for axes, name, label in ((left, "loss", "training loss"), (right, "error", "validation error %")):
                for index, arm in enumerate(self.arms):
                    _draw_arm(axes, arm, name, f"C{index % 10}", _DASHES[index // 10 % len(_DASHES)])
                axes.set(xlabel="steps", ylabel=label)
                axes.grid(alpha=0.3)
            left.set_yscale("log")
            right.set_ylim(bottom=0)
            right.legend(fontsize="x-small" if len(self.arms) > 6 else "medium")


_DASHES = ("-", "--", ":", "-.")


def _draw_arm(axes: "Axes", arm: ArmResult, name: str, colour: str, dashes: str) -> None:
    curves = [[getattr(point, name) for point in run.curve] for run in arm.runs]
    steps = [point.step for point in arm.runs[0].curve]
    columns = list(zip(*curves, strict=True))
    axes.plot(steps, [statistics.fmean(column) for column in columns], color=colour, ls=dashes, label=arm.name)
    if len(curves) > 1:
        axes.fill_between(steps, [min(one) for one in columns], [max(one) for one in columns], color=colour, alpha=0.15)


def versions() -> Mapping[str, str]:
    """Return the versions of what an experiment runs on."""
    try:
        own = version("dnifx")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "dnifx": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """Return a device in words: the GPU's name, or the CPU's architecture and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
