"""The delayed cue: truncated backpropagation against synthetic gradients and, where there is one, the exact gradient."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import dnifx
from dnifx.zoo.delayed_cue import CueCells, CueNetwork, DelayedCue, learn
from dnifx.zoo.recipes.checks import check_least
from dnifx.zoo.recipes.live import live
from dnifx.zoo.recipes.machine import versions
from dnifx.zoo.recipes.outputs import prepare
from dnifx.zoo.recipes.pictures import draw_curves, picture
from dnifx.zoo.recipes.registry import RECIPES
from dnifx.zoo.recipes.report import empty_table, report, write_files
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.sequence_options import CUE_NAMES, Cue

LAST = 40
"""Number of episodes over which the share of right answers is averaged."""


@dataclass(frozen=True)
class CueResults:
    """The share of right answers in each episode, by variant and seed."""

    command: str
    options: dict[str, Any]
    right: dict[str, tuple[list[float], ...]]
    versions: dict[str, str]

    def __rich__(self) -> Table:
        delay = self.options["windows"] - 1
        table = empty_table(f"Delayed cue, delay of {delay} windows", ("variant", "right at the end", "by seed"))
        for name, runs in self.right.items():
            ends = [statistics.fmean(run[-LAST:]) for run in runs]
            table.add_row(name, f"{statistics.fmean(ends):.3f}", ", ".join(f"{end:.3f}" for end in ends))
        return table

    def to_folder(self, folder: Path) -> tuple[str, ...]:
        """Write ``results.json`` and ``curves.png`` into ``folder`` and return both names.

        Raises:
            DataError: matplotlib is not installed. The JSON is written first.
        """
        return write_files(folder, asdict(self), self._draw, indent=None)

    def _draw(self, path: Path) -> None:
        with picture(path, f"A cue that is asked for {self.options['windows'] - 1} windows later", (7, 4)) as figure:
            axes = figure.subplots()
            axes.set_ylim(0.3, 1.03)
            axes.axhline(0.5, color="gray", linestyle=":")
            axes.annotate("chance", (0.01, 0.51), xycoords=("axes fraction", "data"), color="gray", fontsize="small")
            draw_curves(axes, {name: smoothed(runs) for name, runs in self.right.items()})
            axes.set(xlabel="episodes", ylabel="share of right answers")


def smoothed(runs: Sequence[Sequence[float]]) -> dict[int, list[float]]:
    """Return the mean of the last episodes of each run, by episode."""
    return {
        place + 1: [statistics.fmean(each[max(0, place - LAST + 1) : place + 1]) for each in runs]
        for place in range(min(map(len, runs)))
    }


def run(options: Cue, console: Console | None = None) -> CueResults:
    """Train all variants from every seed.

    Args:
        options: What to train.
        console: Shows progress and results. By default nothing is shown.

    Raises:
        OptionError: An option is out of its range, or ``options.out`` cannot be written to.
    """
    console = console or Console(quiet=True)
    check_least(options, dict.fromkeys(("unroll", "batch", "episodes", "seeds"), 1) | {"windows": 2})
    prepare(options.out)
    task = DelayedCue(options.unroll, options.batch, options.windows)
    gradients = {"truncated": "zero", "dni": dnifx.estimators.SyntheticState(hidden=0), "exact": "exact"}
    network: type[CueNetwork | CueCells] = CueCells if options.network == "mingru" else CueNetwork
    right: dict[str, tuple[list[float], ...]] = {}
    counts = {CUE_NAMES[variant]: options.seeds for variant in options.variants}
    with live(console, counts, options.episodes, options.log_dir) as shown:

        def learned(variant: str, seed: int) -> list[float]:
            line = shown.line(CUE_NAMES[variant], seed)

            def told(episode: int, loss: float, share: float) -> None:
                line.step(episode)
                line.point(Point(episode, loss, 100 * (1 - share)))

            return learn(gradients[variant], seed, options.episodes, task, network, options.lr, told)

        seeds = range(options.seed, options.seed + options.seeds)
        for variant in options.variants:
            right[CUE_NAMES[variant]] = tuple(learned(variant, seed) for seed in seeds)
    results = CueResults(RECIPES["delayed-cue"].command(options), asdict(options), right, dict(versions()))
    report(results, options.out, console)
    return results
