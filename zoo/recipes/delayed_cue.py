"""The delayed cue: truncated backpropagation against synthetic gradients, as a picture."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import dnifx
from dnifx.errors import OptionError
from dnifx.zoo.delayed_cue import DelayedCue, learn
from dnifx.zoo.recipes.base import Recipe, option
from dnifx.zoo.recipes.pictures import picture
from dnifx.zoo.recipes.results import versions
from dnifx.zoo.recipes.store import write_whole

LAST = 40
"""Episodes over which the share of right answers is averaged: the last ones of a run, and those before each point of a curve."""


@dataclass(frozen=True)
class Cue:
    """Options of the recipe ``delayed-cue``."""

    unroll: int = option(3, "steps of a window; the answer is asked four windows after the cue")
    batch: int = option(64, "episodes at once")
    episodes: int = option(3000, "episodes to train on, of five windows each")
    seeds: int = option(3, "runs of each arm")
    seed: int = option(0, "the first seed; the others follow it")
    out: Path | None = option(None, "folder for results and the picture")  # noqa: RUF009


@dataclass(frozen=True)
class CueResults:
    """The share of right answers in each episode, by arm and seed."""

    command: str
    options: dict[str, Any]
    right: dict[str, tuple[list[float], ...]]
    versions: dict[str, str]

    def __rich__(self) -> Table:
        table = Table("arm", "right at the end", "by seed", title="Delayed cue, delay 4 T", title_justify="left")
        for name, runs in self.right.items():
            ends = [statistics.fmean(run[-LAST:]) for run in runs]
            table.add_row(name, f"{statistics.fmean(ends):.3f}", ", ".join(f"{end:.3f}" for end in ends))
        return table

    def to_folder(self, folder: Path) -> None:
        """Write ``results.json`` and ``curves.png`` into ``folder``.

        Raises:
            DataError: Where matplotlib is absent; the JSON is written first.
        """
        content = json.dumps(asdict(self), default=str)
        write_whole(folder / "results.json", lambda part: part.write_text(content + "\n"))
        self._draw(folder / "curves.png")

    def _draw(self, path: Path) -> None:
        with picture(path, "A cue, asked for four windows later", (7, 4)) as figure:
            axes = figure.subplots()
            for index, (name, runs) in enumerate(self.right.items()):
                for number, each in enumerate(runs):
                    smooth = [
                        statistics.fmean(each[max(0, place - LAST + 1) : place + 1]) for place in range(len(each))
                    ]
                    axes.plot(smooth, linewidth=1, color=f"C{index}", alpha=0.8, label=None if number else name)
            axes.axhline(0.5, color="gray", linestyle=":", label="chance")
            axes.set(xlabel="episodes", ylabel="share of right answers", ylim=(0.3, 1.03))
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right")


def run(options: Cue, console: Console | None = None) -> CueResults:
    """Train both arms from every seed.

    Args:
        options: What to train.
        console: Where progress and results are shown; nowhere by default.

    Raises:
        OptionError: Where a value is out of its range.
    """
    console = console or Console(quiet=True)
    for name in ("episodes", "seeds"):
        if getattr(options, name) < 1:
            raise OptionError(f"--{name}: got {getattr(options, name)}, expected 1 or more")
    task = DelayedCue(options.unroll, options.batch)
    arms = {"truncated BPTT": "zero", "DNI": dnifx.estimators.SyntheticState(hidden=0)}
    right: dict[str, tuple[list[float], ...]] = {}
    with Progress(console=console) as progress:
        for name, gradient in arms.items():
            seeds = range(options.seed, options.seed + options.seeds)
            each = progress.track(seeds, description=name)
            right[name] = tuple(learn(gradient, seed, options.episodes, task) for seed in each)
    results = CueResults(DELAYED_CUE.command(options), asdict(options), right, dict(versions()))
    console.print(results)
    if options.out is not None:
        results.to_folder(options.out)
        console.print(f"results.json and curves.png are in {options.out}")
    return results


DELAYED_CUE = Recipe("delayed-cue", "a cue asked for beyond the window: truncated BPTT against DNI", Cue, run)
