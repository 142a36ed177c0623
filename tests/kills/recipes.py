"""A short run of every recipe, as its command line. Each saves several checkpoints."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path

from dnifx.cli import main

FEEDFORWARD = (
    "--data digits --validation 1400 --width 6 --estimator-width 6 --batch 16 --seeds 1 "
    "--steps 6 --evaluate-every 2 --diagnose-every 2 --probe-every 3"
)
SEQUENCE = "--width 6 --batch 3 --steps 6 --evaluate-every 2 --lr 0.01"

BRIEF: Mapping[str, str] = {
    "fcn": f"{FEEDFORWARD} --layers 3 --gradient backprop,synthetic --context label --seeds 2",
    "cnn": f"{FEEDFORWARD} --gradient backprop,synthetic --context none --target fused",
    "table1": f"{FEEDFORWARD} --layers 3 --gradient zero,synthetic --context label",
    "single": f"{FEEDFORWARD} --layers 3 --position 1 --gradient synthetic",
    "sparse": f"{FEEDFORWARD} --layers 3 --p 0.7 --context label --lag 2",
    "unlock": f"{FEEDFORWARD} --layers 3 --p 0.7 --context none",
    "deep": f"{FEEDFORWARD} --layers 4",
    "stale": f"{FEEDFORWARD} --layers 3 --gradient stale --decay 0.5,0.9",
    "estimators": f"{FEEDFORWARD} --layers 3 --gradient critic,oracle --context label",
    "copy": f"{SEQUENCE} --variants dni-aux",
    "repeat-copy": f"{SEQUENCE} --variants bptt,dni",
    "charlm": f"{SEQUENCE} --variants dni --text {{text}},{{text}},{{text}}",
    "delayed-cue": "--batch 4 --episodes 20 --seeds 1",
    "two-clocks": "--data digits --width 6 --estimator-width 6 --batch 4 --ticks 2 --windows 12 --evaluate-every 4 "
    "--test-periods 1 --variants joint,cdni",
    "table": "--model fcn --layers 2 --width 6 --batch 8 --steps 4 --evaluate-every 2 --variants synthetic,mirrors",
}
"""The options of each recipe. ``{text}`` is a text to read."""

QUICK = "charlm"
"""The one that takes least time."""


def train(recipe: str, out: Path, text: Path) -> None:
    """Run a recipe as its command does, which ends in SystemExit.

    Args:
        recipe: Its name.
        out: The folder for its output.
        text: A text for character models.
    """
    words = BRIEF[recipe].format(text=text).split()
    main(["train", recipe, *words, "--out", str(out)])


def warm(folder: Path, recipe: str = "fcn") -> Path:
    """Import all that the recipes import, by running one; write a text for them, and return it."""
    text = folder / "text.txt"
    text.write_text("hello world. " * 30)
    with redirect_stdout(io.StringIO()), suppress(SystemExit):
        train(recipe, folder / "warm", text)
    return text
