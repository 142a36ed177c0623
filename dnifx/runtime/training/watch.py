"""A watch over synthetic gradients: running averages for display, and a warning where one does harm."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dnifx.errors import HarmWarning, OptionError, StateError

SHOWN = ("cosine", "relative_error", "wrong_signs")

ALWAYS = "or fit before use (schedules.warm_up), or mix in the true gradient (estimators.BPLambda)"
REMEDIES = {
    "direction": (
        "give it the label (context='label'), more capacity (Synthetic(hidden=2)) or a higher estimator_optimizer rate; "
        + ALWAYS
    ),
    "norm": "its steps are too coarse for its target: lower the estimator_optimizer rate, or use Adam there; " + ALWAYS,
}
"""What helps against each harm."""


def judged(averages: Mapping[str, float]) -> str:
    """Return the cosine that says best what an estimate does to its producer: that of the parameters' gradients, where it is known."""
    return "parameter_cosine" if "parameter_cosine" in averages else "cosine"


@dataclass
class Watch:
    """Follows the diagnostics of training steps, and warns once for each boundary where a synthetic gradient does harm.

    Harm is a cosine that stays below ``cosine``: that of the gradients of the producer's parameters, where it is known, else that of
    the estimate and its target. Harm is, too, a norm of the estimates that stays above ``growth`` times the targets'. Either has to last
    for ``patience`` looks on end. Both are judged by running averages, so that one batch decides nothing.

    Args:
        patience: Looks in a row before it warns.
        cosine: Average cosine below which an estimate points the wrong way.
        growth: Norm of the estimates over that of the targets above which they have run away: with 3, nearly all of an estimate is noise.
        decay: Share of the average that stays at each look, in [0, 1).

    Raises:
        OptionError: An option is out of its range.

    Example:
        >>> import torch
        >>> watch = Watch()
        >>> numbers = {"cosine": 0.5, "relative_error": 0.8, "wrong_signs": 0.25, "estimate_norm": 1.0, "target_norm": 2.0}
        >>> watch.see({"layer1": {name: torch.tensor(number) for name, number in numbers.items()}})
        >>> print(watch)
        layer1: cosine 0.50, relative error 0.80, wrong signs 25%
    """

    patience: int = 50
    cosine: float = 0.0
    growth: float = 3.0
    decay: float = 0.9
    averages: dict[str, dict[str, float]] = field(default_factory=dict, init=False)
    streaks: dict[tuple[str, str], int] = field(default_factory=dict, init=False)
    warned: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if self.patience < 1 or self.growth <= 0 or not -1 <= self.cosine <= 1 or not 0 <= self.decay < 1:
            raise OptionError(f"{self!r}: patience of 1 or more, cosine in [-1, 1], growth above 0, decay in [0, 1)")

    def see(self, diagnostics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in the diagnostics of a step (``StepResult.diagnostics``, or one half of a probe).

        Warns:
            HarmWarning: Once for each boundary.
        """
        for name, harm in self.notice(diagnostics):
            warnings.warn(HarmWarning(f"{self.fault(name, harm)}; {REMEDIES[harm]}"), stacklevel=2)

    def notice(self, diagnostics: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, str]]:
        """Take in the diagnostics of a step as ``see`` does, and return what it would warn of, for whoever shows it otherwise.

        Returns:
            Pairs of a boundary and its harm, ``direction`` or ``norm``; each boundary once and no more.
        """
        found = []
        for name, numbers in diagnostics.items():
            self.average(name, {key: float(number) for key, number in numbers.items()})
            for harm, present in self.harms(self.averages[name]).items():
                streak = self.streaks.get((name, harm), 0) + 1 if present else 0
                self.streaks[name, harm] = streak
                if streak >= self.patience and name not in self.warned:
                    self.warned.add(name)
                    found.append((name, harm))
        return found

    def average(self, name: str, numbers: Mapping[str, float]) -> None:
        """Take a look's numbers into the running averages; those that are not numbers, as 0/0, leave them as they are."""
        before = self.averages.setdefault(name, {})
        for key, number in numbers.items():
            old = before.setdefault(key, number)
            if not math.isnan(number):
                before[key] = number if math.isnan(old) else self.decay * old + (1 - self.decay) * number

    def harms(self, averages: Mapping[str, float]) -> dict[str, bool]:
        """Say which harms a boundary's averages show."""
        runaway = averages["estimate_norm"] > self.growth * averages["target_norm"]
        return {"direction": averages[judged(averages)] < self.cosine, "norm": runaway}

    def fault(self, name: str, harm: str) -> str:
        """Say what the synthetic gradient of a boundary does wrong."""
        found = self.averages[name]
        if harm == "direction":
            of = " of parameter gradients" if judged(found) == "parameter_cosine" else ""
            text = f"points away from its target: an average cosine{of} of {found[judged(found)]:.2f}"
        else:
            ratio = found["estimate_norm"] / max(found["target_norm"], 1e-30)
            text = f"has run away: its norm is {ratio:.3g} times its target's"
        return f"the synthetic gradient of boundary {name!r} {text} over {self.patience} looks and more"

    def state_dict(self) -> dict[str, object]:
        """Return what it has seen, in plain types, for JSON and for a later ``load_state_dict``."""
        return {
            "averages": {name: dict(found) for name, found in self.averages.items()},
            "streaks": [[*key, streak] for key, streak in self.streaks.items()],
            "warned": sorted(self.warned),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what another one had seen.

        Raises:
            StateError: It is no state of a watch.
        """
        averages, streaks, warned = state["averages"], state["streaks"], state["warned"]
        if not (isinstance(averages, Mapping) and isinstance(streaks, list) and isinstance(warned, list)):
            raise StateError("this is no state of a Watch; give what Watch.state_dict() returned")
        self.averages = {name: dict(found) for name, found in averages.items()}
        self.streaks = {(name, harm): streak for name, harm, streak in streaks}
        self.warned = set(warned)

    def __str__(self) -> str:
        lines = []
        for name, found in self.averages.items():
            cosine, error, wrong = (found[key] for key in SHOWN)
            producer = f", parameter cosine {found['parameter_cosine']:.2f}" if "parameter_cosine" in found else ""
            lines.append(f"{name}: cosine {cosine:.2f}{producer}, relative error {error:.2f}, wrong signs {wrong:.0%}")
        return "\n".join(lines)
