"""Kills runs of the recipes at random moments: ``python -m tests.kills --count 1000 --seed 0``.

Each run is killed up to six times, by SIGKILL, SIGTERM, Ctrl-C or a full disk, and started again each time. In the end its
results and checkpoints have to be those of a run that nobody killed, and nothing else may be in its folder. Exits with 1 if
anything is wrong, and tells the seed that repeats it.
"""

import sys
import tempfile
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.kills.disks import small_disk
from tests.kills.recipes import BRIEF, train, warm
from tests.kills.trials import Trial, Trials


def main(
    count: Annotated[int, typer.Option(help="How many kills.")] = 100,
    seed: Annotated[int, typer.Option(help="The first run's; the others count up from it.")] = 0,
    recipe: Annotated[list[str] | None, typer.Option(help="Only these recipes.")] = None,
) -> None:
    """Kill runs and tell what they leave."""
    torch.set_num_threads(1)
    console = Console(soft_wrap=True)
    kinds: Counter[str] = Counter()
    wrong: list[Trial] = []
    runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = warm(folder)
        with small_disk(folder / "disk") as small:
            if not small:
                console.print("no full disks: mounting a small file system is not allowed here")
        trials = Trials(folder, {each: partial(train, each, text=text) for each in recipe or BRIEF}, small)
        with suppress(KeyboardInterrupt), Progress(*columns(), console=console, auto_refresh=False) as progress:
            task = progress.add_task("kills", total=count)
            while kinds.total() < count:
                trial = trials.run(seed + runs)
                runs += 1
                kinds += trial.kinds
                if trial.wrong:
                    wrong.append(trial)
                    console.print(
                        f"{trial}\n  again: python -m tests.kills --count 1 --seed {trial.seed}", markup=False
                    )
                progress.update(task, completed=kinds.total(), refresh=True)
    console.print(table(kinds, runs, len(wrong)))
    sys.exit(bool(wrong))


def columns() -> list[ProgressColumn]:
    """Return what the progress display shows."""
    return [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]


def table(kinds: Counter[str], runs: int, wrong: int) -> Table:
    """Return the counts."""
    made = Table("ended by", "kills", title=f"{kinds.total()} kills in {runs} runs, {wrong} of them wrong")
    for kind, number in sorted(kinds.items()):
        made.add_row(kind, str(number))
    return made


if __name__ == "__main__":
    typer.run(main)
