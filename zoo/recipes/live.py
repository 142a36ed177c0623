"""The progress of an experiment, one line an arm."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dnifx.zoo.recipes.results import Point


@dataclass(frozen=True)
class Line:
    """The line of one arm while one of its runs is trained.

    Attributes:
        progress: What shows it.
        task: The arm's task there.
        before: Steps of the runs that the arm has finished.
        seed: The seed of this run.
    """

    progress: Progress
    task: TaskID
    before: int
    seed: int

    def step(self, step: int) -> None:
        """Show that ``step`` steps of this run are done."""
        self.progress.start_task(self.task)
        self.progress.update(self.task, completed=self.before + step)

    def point(self, point: Point) -> None:
        """Show the run's newest place on its curve."""
        state = f"seed {self.seed}  loss {point.loss:.4f}  error {point.error:.2f}%"
        self.progress.update(self.task, state=state)


class Live:
    """The lines of all arms.

    Args:
        progress: What shows them.
        names: The arms' names.
        steps: Training steps of one run.
        seeds: The seeds, in the order they are run.
    """

    def __init__(self, progress: Progress, names: Sequence[str], steps: int, seeds: Sequence[int]) -> None:
        self._progress = progress
        self._steps = steps
        self._seeds = list(seeds)
        total = steps * len(self._seeds)
        self._tasks = {name: progress.add_task(name, start=False, total=total, state="") for name in names}

    def line(self, name: str, seed: int) -> Line:
        """Return the line of the arm ``name`` for its run of ``seed``."""
        return Line(self._progress, self._tasks[name], self._seeds.index(seed) * self._steps, seed)


@contextmanager
def live(console: Console, names: Sequence[str], steps: int, seeds: Sequence[int]) -> Iterator[Live]:
    """Show the progress of an experiment on ``console`` while the context lasts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Live(progress, names, steps, seeds)
