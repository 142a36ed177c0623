"""The progress of runs for TensorBoard: losses, errors, and how good the synthetic gradients are."""

import re
from pathlib import Path
from typing import Any

from dnifx.errors import OptionError
from dnifx.zoo.recipes.diagnosis import Look
from dnifx.zoo.recipes.results import Point


class Board:
    """What TensorBoard shows of one run.

    Args:
        folder: The folder of this run.

    Raises:
        OptionError: TensorBoard is not installed, or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError("--log-dir needs TensorBoard: pip install tensorboard, or leave it out") from error
        try:
            self._writer: Any = SummaryWriter(folder)
        except OSError as error:
            raise OptionError(
                f"--log-dir {folder}: cannot be written: {error.strerror}; name another folder"
            ) from error

    def point(self, point: Point) -> None:
        """Add a point of the curve."""
        self._writer.add_scalar("loss", point.loss, point.step)
        self._writer.add_scalar("validation", point.error, point.step)

    def look(self, look: Look) -> None:
        """Add the measures of each boundary."""
        for boundary, measures in look.boundaries.items():
            for name, value in measures.items():
                self._writer.add_scalar(f"{boundary}/{name}", value, look.step)

    def harm(self, text: str) -> None:
        """Add a warning."""
        self._writer.add_text("warnings", text)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


def board_of(log_dir: Path | None, variant: str, seed: int) -> Board | None:
    """Return the board of a run, in a folder of its own; None where there is no ``log_dir``.

    Args:
        log_dir: The folder that TensorBoard is shown.
        variant: The variant's name.
        seed: The run's seed.
    """
    if log_dir is None:
        return None
    name = re.sub(r"[^\w.=-]+", "-", variant)
    return Board(log_dir / f"{name}-seed={seed}")
