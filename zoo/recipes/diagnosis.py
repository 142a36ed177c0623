"""How good the synthetic gradients of a run were: looks at a watch, as JSON and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dnifx import Watch
from dnifx.errors import DataError
from dnifx.zoo.recipes.store import write_whole

MEASURES = {"cosine": "cosine", "relative_error": "relative L2 error", "wrong_signs": "share of wrong signs"}
"""What is kept of a look, and how a picture calls it."""


@dataclass(frozen=True)
class Look:
    """One look at the synthetic gradients of a run.

    Attributes:
        step: Training steps done.
        boundaries: By boundary name, the watch's running averages: cosine, relative error and share of wrong signs.
    """

    step: int
    boundaries: Mapping[str, Mapping[str, float]]

    @classmethod
    def at(cls, step: int, watch: Watch) -> "Look":
        """Return what a watch shows after ``step`` steps."""
        found = {name: {key: numbers[key] for key in MEASURES} for name, numbers in watch.averages.items()}
        return cls(step, found)

    def __str__(self) -> str:
        """The least cosine and the boundary that has it, short enough for a line of progress."""
        if not self.boundaries:
            return ""
        name = min(self.boundaries, key=lambda each: self.boundaries[each]["cosine"])
        return f"cosine {self.boundaries[name]['cosine']:.2f} at {name}"


def as_json(looks: Sequence[Look]) -> list[dict[str, Any]]:
    """Return looks in plain types."""
    return [asdict(look) for look in looks]


def draw_looks(title: str, looks: Sequence[Look], path: Path) -> None:
    """Draw each measure over the steps, a line for each boundary.

    Args:
        title: Of the picture.
        looks: In the order of their steps.
        path: The picture to write, a PNG.

    Raises:
        DataError: Where matplotlib, which draws the picture, is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"{path.name} needs matplotlib, which is absent: pip install 'dnifx[zoo]'") from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    names = list(dict.fromkeys(name for look in looks for name in look.boundaries))
    for axes, (key, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for name in names:
            seen = [look for look in looks if name in look.boundaries]
            axes.plot([look.step for look in seen], [look.boundaries[name][key] for look in seen], label=name)
        axes.set(xlabel="steps", ylabel=label)
        axes.grid(alpha=0.3)
        if key == "cosine":
            axes.axhline(0, color="black", linewidth=0.8)
    if names:
        axes.legend(title="boundary")
    figure.suptitle(title)
    write_whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))
