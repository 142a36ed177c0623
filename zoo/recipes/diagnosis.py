"""How good the synthetic gradients of a run are: looks at them while it is trained, and the picture of the looks."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dnifx import Watch
from dnifx.zoo.recipes.pictures import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {"cosine": "cosine", "relative_error": "relative L2 error", "wrong_signs": "share of wrong signs"}
"""What is kept of a comparison, and how a picture calls it."""

REMEDIES = {
    "direction": "try --context label, --hidden 2, a higher --estimator-lr, or --gradient bplambda",
    "norm": "its steps are too coarse for its target: try a lower --estimator-lr, or --gradient bplambda",
}
"""What helps against each harm that a watch finds, in the options of the recipes."""

Comparison = Mapping[str, Mapping[str, Tensor]]
"""By boundary name, the measures of a synthetic gradient beside another one, as scalars."""


@dataclass(frozen=True)
class Look:
    """How good the synthetic gradients of a run were at one time.

    Attributes:
        step: Training steps done.
        boundaries: By boundary name, cosine, relative error and share of wrong signs, but for those that are no number.
    """

    step: int
    boundaries: Mapping[str, Mapping[str, float]]

    @classmethod
    def at(cls, step: int, numbers: Mapping[str, Mapping[str, float | Tensor]]) -> "Look":
        """Return what a comparison, or a watch's averages, show after ``step`` steps."""
        kept = {name: {key: float(found[key]) for key in MEASURES} for name, found in numbers.items()}
        return cls(
            step, {name: {key: each for key, each in one.items() if not math.isnan(each)} for name, one in kept.items()}
        )

    def __str__(self) -> str:
        """The least cosine and the boundary that has it, short enough for a line of progress."""
        cosines = {name: found["cosine"] for name, found in self.boundaries.items() if "cosine" in found}
        if not cosines:
            return ""
        name = min(cosines, key=cosines.__getitem__)
        return f"cosine {cosines[name]:.2f} at {name}"


@dataclass
class Diagnosis:
    """Follows the synthetic gradients of one run.

    Args:
        batch: Inputs [batch, ...] and classes [batch] of validation examples, to compare with the true gradient on.
        every: Steps from one look to the next; 0 for none.
        probe_every: Steps from one comparison with the true gradient to the next; 0 for none.

    Attributes:
        watch: The running averages over the looks.
        looks: What the watch showed, against the gradients that the synthetic ones are fitted to.
        probes: The comparisons with the true gradient.
        harms: What the watch warned of, with the step.
    """

    batch: tuple[Tensor, Tensor]
    every: int = 0
    probe_every: int = 0
    watch: Watch = field(default_factory=Watch)
    looks: list[Look] = field(default_factory=list)
    probes: list[Look] = field(default_factory=list)
    harms: list[str] = field(default_factory=list)

    def looks_at(self, step: int) -> bool:
        """Whether step ``step``, the first of which is 1, is to be compared with the gradients that arrive."""
        return self.every > 0 and step % self.every == 0

    def probes_at(self, step: int) -> bool:
        """Whether the true gradient is to be computed after step ``step``."""
        return self.probe_every > 0 and step % self.probe_every == 0

    def see(self, step: int, found: Comparison) -> list[str]:
        """Take in a step's comparison, and return what is to be warned of: a sentence for each harm that is new."""
        new = self.watch.notice(found)
        harms = [f"step {step:,}: {self.watch.fault(name, harm)}; {REMEDIES[harm]}" for name, harm in new]
        self.looks.append(Look.at(step, self.watch.averages))
        self.harms += harms
        return harms

    def compare(self, step: int, found: Comparison) -> None:
        """Take in a comparison with the true gradient after ``step`` steps."""
        self.probes.append(Look.at(step, found))

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, in plain types."""
        return {
            "watch": self.watch.state_dict(),
            "looks": [asdict(look) for look in self.looks],
            "probes": [asdict(look) for look in self.probes],
            "harms": list(self.harms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another one had seen."""
        self.watch.load_state_dict(state["watch"])
        self.looks = [Look(**look) for look in state["looks"]]
        self.probes = [Look(**look) for look in state["probes"]]
        self.harms = list(state["harms"])


@dataclass(frozen=True)
class Row:
    """One row of a picture of looks.

    Attributes:
        name: The arm's name.
        looks: By run, the looks against the gradients that the synthetic ones are fitted to.
        probes: By run, those against the true gradient.
    """

    name: str
    looks: Sequence[Sequence[Look]]
    probes: Sequence[Sequence[Look]] = ()

    @property
    def boundaries(self) -> set[str]:
        """The names of all boundaries that were seen."""
        return {name for look in chain(*self.looks, *self.probes) for name in look.boundaries}


def draw_looks(title: str, rows: Sequence[Row], path: Path) -> None:
    """Draw each measure over the steps: a row for each arm, a line for each boundary, dashed against the true gradient.

    Lines are means over the runs of an arm, bands go from the least to the greatest.

    Args:
        title: Of the picture.
        rows: The arms.
        path: The picture to write, a PNG.

    Raises:
        DataError: Where matplotlib, which draws the picture, is absent.
    """
    with picture(path, title, (14, 0.8 + 3 * len(rows))) as figure:
        colours = _colours(set().union(*(row.boundaries for row in rows)))
        for row, panels in zip(rows, figure.subplots(len(rows), len(MEASURES), squeeze=False), strict=True):
            for axes, (key, label) in zip(panels, MEASURES.items(), strict=True):
                for name in sorted(row.boundaries, key=_natural):
                    _draw_line(axes, _values(row.looks, name, key), colours[name], "-")
                    _draw_line(axes, _values(row.probes, name, key), colours[name], "--")
                _finish(axes, key, label)
            panels[0].set_title(row.name, loc="left")
        _legend(figure, colours, any(map(len, chain(*(row.probes for row in rows)))))


def _values(runs: Iterable[Sequence[Look]], name: str, key: str) -> Mapping[int, Sequence[float]]:
    values: dict[int, list[float]] = {}
    for look in chain(*runs):
        if key in look.boundaries.get(name, {}):
            values.setdefault(look.step, []).append(look.boundaries[name][key])
    return dict(sorted(values.items()))


def _draw_line(axes: "Axes", values: Mapping[int, Sequence[float]], colour: Any, dashes: str) -> None:
    marker = "." if len(values) == 1 else ""
    axes.plot(
        list(values), [statistics.fmean(each) for each in values.values()], color=colour, ls=dashes, marker=marker
    )
    if any(len(each) > 1 for each in values.values()):
        lowest, highest = ([bound(each) for each in values.values()] for bound in (min, max))
        axes.fill_between(list(values), lowest, highest, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: "Axes", key: str, label: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set(xlabel="steps", ylabel=label)
    axes.grid(alpha=0.3)
    if key == "relative_error":
        axes.set_yscale("log", subs=[])
        lowest, highest = axes.get_ylim()
        axes.set_ylim(min(lowest, 0.5), max(highest, 2.0))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    # No direction at all: a cosine of 0, half of the signs wrong, an error as large as the gradient itself.
    axes.axhline({"cosine": 0.0, "relative_error": 1.0, "wrong_signs": 0.5}[key], color="black", linewidth=0.8)


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
