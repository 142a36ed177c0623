"""The quality of a run's synthetic gradients: measured while it trains, and drawn as a picture.

A look compares every synthetic gradient with the gradient that it is fitted to, at one step. A
probe compares it with the true gradient.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dnifx import Watch
from dnifx.zoo.recipes.pictures import draw_mean, picture, scale_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {
    "cosine": "cosine",
    "parameter_cosine": "cosine of parameter gradients",
    "relative_error": "relative L2 error",
    "wrong_signs": "share of wrong signs",
}
"""The measures that are kept of a comparison, and their labels in a picture."""

REMEDIES = {
    "direction": "try --context label, --hidden 2, a higher --estimator-lr, or --gradient bplambda",
    "norm": "its steps are too large for its target: try a lower --estimator-lr, or --gradient bplambda",
}
"""The recipe options that help against each harm that a watch finds."""

Comparison = Mapping[str, Mapping[str, Tensor]]
"""The measures of a synthetic gradient against another gradient, as scalars, by boundary name."""


@dataclass(frozen=True)
class Look:
    """The quality of a run's synthetic gradients at one step.

    Attributes:
        step: Training steps done.
        boundaries: The measures that are known, by boundary name, without NaN.
    """

    step: int
    boundaries: Mapping[str, Mapping[str, float]]

    @classmethod
    def at(cls, step: int, numbers: Mapping[str, Mapping[str, float | Tensor]]) -> "Look":
        """Return the look at a comparison, or at a watch's averages, after ``step`` steps."""
        kept = {name: {key: float(found[key]) for key in MEASURES if key in found} for name, found in numbers.items()}
        return cls(
            step, {name: {key: each for key, each in one.items() if not math.isnan(each)} for name, one in kept.items()}
        )

    def __str__(self) -> str:
        """The smallest cosine and its boundary, for a line of progress."""
        cosines = {name: found["cosine"] for name, found in self.boundaries.items() if "cosine" in found}
        if not cosines:
            return ""
        name = min(cosines, key=cosines.__getitem__)
        return f"cosine {cosines[name]:.2f} at {name}"


@dataclass
class Diagnosis:
    """Follows the synthetic gradients of one run.

    Args:
        batch: Inputs [batch, ...] and classes [batch] of the validation examples that probes use.
        every: Look every so many steps; 0 for never.
        probe_every: Probe every so many steps; 0 for never.

    Attributes:
        watch: The running averages over the looks.
        looks: The watch's averages at each look.
        probes: The comparisons with the true gradient.
        harms: The watch's warnings, with the step.
    """

    batch: tuple[Tensor, Tensor]
    every: int = 0
    probe_every: int = 0
    watch: Watch = field(default_factory=Watch)
    looks: list[Look] = field(default_factory=list)
    probes: list[Look] = field(default_factory=list)
    harms: list[str] = field(default_factory=list)

    def looks_at(self, step: int) -> bool:
        """Whether to look in step ``step``. The first step is 1."""
        return self.every > 0 and step % self.every == 0

    def probes_at(self, step: int) -> bool:
        """Whether to probe after step ``step``."""
        return self.probe_every > 0 and step % self.probe_every == 0

    def see(self, step: int, found: Comparison) -> list[str]:
        """Add a step's comparison, and return a warning for each new harm."""
        new = self.watch.notice(found)
        harms = [f"step {step:,}: {self.watch.fault(name, harm)}; {REMEDIES[harm]}" for name, harm in new]
        self.looks.append(Look.at(step, self.watch.averages))
        self.harms += harms
        return harms

    def compare(self, step: int, found: Comparison) -> None:
        """Add a comparison with the true gradient after ``step`` steps."""
        self.probes.append(Look.at(step, found))

    def state_dict(self) -> dict[str, Any]:
        """Return all looks, probes and warnings, in plain types."""
        return {
            "watch": self.watch.state_dict(),
            "looks": [asdict(look) for look in self.looks],
            "probes": [asdict(look) for look in self.probes],
            "harms": list(self.harms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.watch.load_state_dict(state["watch"])
        self.looks = [Look(**look) for look in state["looks"]]
        self.probes = [Look(**look) for look in state["probes"]]
        self.harms = list(state["harms"])


@dataclass(frozen=True)
class Row:
    """One row of a picture of looks.

    Attributes:
        name: The variant's name.
        looks: The looks of each run.
        probes: The probes of each run.
    """

    name: str
    looks: Sequence[Sequence[Look]]
    probes: Sequence[Sequence[Look]] = ()

    @property
    def boundaries(self) -> set[str]:
        """The names of all boundaries in the looks and probes."""
        return {name for look in chain(*self.looks, *self.probes) for name in look.boundaries}


def draw_looks(title: str, rows: Sequence[Row], path: Path) -> None:
    """Draw each measure over the steps, with a row for each variant and a line for each boundary.

    Dashed lines show the probes. Lines are means over the runs; bands go from the smallest value to
    the largest.

    Args:
        title: Title of the picture.
        rows: The variants.
        path: The picture to write, a PNG.

    Raises:
        DataError: matplotlib is not installed.
    """
    with picture(path, title, (18, 0.8 + 3 * len(rows))) as figure:
        colours = _colours(set().union(*(row.boundaries for row in rows)))
        for row, panels in zip(rows, figure.subplots(len(rows), len(MEASURES), squeeze=False), strict=True):
            for axes, (key, label) in zip(panels, MEASURES.items(), strict=True):
                for name in sorted(row.boundaries, key=_natural):
                    draw_mean(axes, _values(row.looks, name, key), colours[name])
                    draw_mean(axes, _values(row.probes, name, key), colours[name], "--")
                _finish(axes, key, label)
            panels[0].set_title(row.name, loc="left")
        _legend(figure, colours, any(map(len, chain(*(row.probes for row in rows)))))


def _values(runs: Iterable[Sequence[Look]], name: str, key: str) -> Mapping[int, Sequence[float]]:
    values: dict[int, list[float]] = {}
    for look in chain(*runs):
        if key in look.boundaries.get(name, {}):
            values.setdefault(look.step, []).append(look.boundaries[name][key])
    return dict(sorted(values.items()))


def _finish(axes: "Axes", key: str, label: str) -> None:
    axes.set(xlabel="steps", ylabel=label)
    axes.grid(alpha=0.3)
    if key == "relative_error":
        axes.set_yscale("log")
        lowest, highest = axes.get_ylim()
        axes.set_ylim(min(lowest, 0.5), max(highest, 2.0))
        scale_log(axes)
    # No information: a cosine of 0, half of the signs wrong, an error as large as the gradient.
    axes.axhline({"relative_error": 1.0, "wrong_signs": 0.5}.get(key, 0.0), color="black", linewidth=0.8)


def _colours(names: Iterable[str]) -> Mapping[str, Any]:
    from matplotlib import colormaps

    ordered = sorted(names, key=_natural)
    deepest = max(len(ordered) - 1, 1)
    return {name: colormaps["viridis"](0.9 * place / deepest) for place, name in enumerate(ordered)}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


def _legend(figure: "Figure", colours: Mapping[str, Any], probed: bool) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if probed:
        lines += [Line2D([], [], color="grey", label="fitted to"), Line2D([], [], color="grey", ls="--", label="true")]
    if lines:
        figure.legend(handles=lines, title="boundary", loc="outside right center", ncols=1 + len(lines) // 12)
