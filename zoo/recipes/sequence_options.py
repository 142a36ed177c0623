"""The options of the recipes ``copy``, ``repeat-copy``, ``charlm`` and ``delayed-cue``."""

from dataclasses import dataclass
from pathlib import Path

from dnifx.zoo.recipes.base import BOARD, option

NAMES = {"bptt": "BPTT", "dni": "DNI", "dni-aux": "DNI+Aux"}
"""The names in tables of the words that ``--variants`` takes."""


@dataclass(frozen=True)
class Sequences:
    """Options of the recipes ``copy``, ``repeat-copy`` and ``charlm``."""

    task: str = option("copy", "Task.", ("copy", "repeat-copy", "charlm"))
    unroll: tuple[int, ...] = option((3,), "Steps of a window. Every variant runs with each length.")
    variants: tuple[str, ...] = option(tuple(NAMES), "How windows are joined, one or more.", NAMES)
    text: tuple[Path, ...] = option(
        (), "Three text files to read instead of tiny Shakespeare: train, validation and test."
    )
    width: int | None = option(None, "Units of the LSTM.")
    batch: int = option(256, "Streams read in parallel.")
    scale: float = option(0.1, "Factor of the synthetic gradients.")
    steps: int = option(10000, "Training steps at most. A step reads one window.")
    lr: float = option(7e-5, "Learning rate of Adam.")
    estimator_lr: float = option(7e-5, "Learning rate of the estimators.")
    seeds: int = option(1, "Runs of each variant.")
    seed: int = option(0, "The first seed. The other runs count up from it.")
    evaluate_every: int = option(1000, "Measure and save a checkpoint every so many steps.")
    out: Path | None = option(  # noqa: RUF009
        None, "Folder for results, curves and checkpoints. The same command resumes there."
    )
    log_dir: Path | None = option(None, BOARD)  # noqa: RUF009


CUE_NAMES = {"truncated": "truncated BPTT", "dni": "DNI", "exact": "exact"}
"""The names in tables of the ways to train on the delayed cue."""


@dataclass(frozen=True)
class Cue:
    """Options of the recipe ``delayed-cue``."""

    variants: tuple[str, ...] = option(
        ("truncated", "dni"), "Ways to train, one or more; exact is for mingru.", CUE_NAMES
    )
    network: str = option("lstm", "Network; the state of mingru changes entry by entry.", ("lstm", "mingru"))
    windows: int = option(5, "Windows of an episode. The first shows the cue, and the last asks for it.")
    unroll: int = option(3, "Steps of a window.")
    batch: int = option(64, "Episodes in parallel.")
    episodes: int = option(3000, "Episodes to train on.")
    lr: float = option(3e-3, "Learning rate of Adam at first.")
    seeds: int = option(3, "Runs of each variant.")
    seed: int = option(0, "The first seed. The other runs count up from it.")
    out: Path | None = option(None, "Folder for results and curves.")  # noqa: RUF009
    log_dir: Path | None = option(None, BOARD)  # noqa: RUF009
