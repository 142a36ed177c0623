"""The progress of an experiment on the console, one line for each variant."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from dnifx.zoo.recipes.board import Board, board_of
from dnifx.zoo.recipes.diagnosis import Look
from dnifx.zoo.recipes.results import Point


@dataclass(frozen=True)
class Line:
    """The line of one variant while one of its runs is trained.

    Attributes:
        progress: The display.
        task: The variant's task in the display.
        name: The variant's name.
        before: Steps of the variant's finished runs.
        seed: The seed of this run.
        board: Keeps it for TensorBoard, if that is asked for.
    """

    progress: Progress
    task: TaskID
    name: str
    before: int
    seed: int
    board: Board | None = None

    def step(self, step: int) -> None:
        """Show that ``step`` steps of this run are done."""
        self.progress.start_task(self.task)
        self.progress.update(self.task, completed=self.before + step)

    def point(self, point: Point, unit: str = "error %") -> None:
        """Show the newest point of the run's curve; ``unit`` says what its error is: ``error %``, ``perplexity``."""
        name, _, sign = unit.partition(" ")
        state = f"seed {self.seed}  loss {point.loss:.4f}  {name} {point.error:.2f}{sign}"
        self.progress.update(self.task, state=state)
        self.keep(point)

    def keep(self, point: Point) -> None:
        """Keep a point of the run's curve for TensorBoard alone."""
        if self.board is not None:
            self.board.point(point)

    def look(self, look: Look) -> None:
        """Show the worst of the run's synthetic gradients."""
        self.progress.update(self.task, look=str(look))
        if self.board is not None:
            self.board.look(look)

    def harm(self, text: str) -> None:
        """Warn that a synthetic gradient does harm, and say what helps."""
        self.progress.console.print(f"{self.name}, seed {self.seed}, {text}", style="yellow")
        if self.board is not None:
            self.board.harm(text)


class Live:
    """The lines of all variants.

    Args:
        progress: The display.
        runs: Number of runs of each variant, by name.
        steps: Training steps of one run.
        log_dir: The folder for TensorBoard, if it is asked for.
    """

    def __init__(self, progress: Progress, runs: Mapping[str, int], steps: int, log_dir: Path | None = None) -> None:
        self._log_dir = log_dir
        self._board: Board | None = None
        self._progress = progress
        self._steps = steps
        self._begun = dict.fromkeys(runs, 0)
        self._tasks = {
            name: progress.add_task(name, start=False, total=steps * count, state="", look="")
            for name, count in runs.items()
        }

    def line(self, name: str, seed: int) -> Line:
        """Return the line of the variant ``name`` for its next run, from ``seed``."""
        before = self._begun[name] * self._steps
        self._begun[name] += 1
        self.close()
        self._board = board_of(self._log_dir, name, seed)
        return Line(self._progress, self._tasks[name], name, before, seed, self._board)

    def close(self) -> None:
        """Write the last run's board."""
        if self._board is not None:
            self._board.close()


@contextmanager
def live(console: Console, runs: Mapping[str, int], steps: int, log_dir: Path | None = None) -> Iterator[Live]:
    """Show the progress of an experiment on ``console`` until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}  {task.fields[look]}", table_column=Column()),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        shown = Live(progress, runs, steps, log_dir)
        try:
            yield shown
        finally:
            shown.close()
