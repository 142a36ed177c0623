"""The options of the recipe ``two-clocks``."""

from dataclasses import dataclass
from pathlib import Path

from dnifx.errors import OptionError
from dnifx.zoo.recipes.base import BOARD, flag, option
from dnifx.zoo.recipes.checks import check_given, check_least, check_rates

NAMES = {"joint": "joint backprop", "dni": "DNI", "cdni": "cDNI", "none": "no gradient"}
"""The names in tables of the words that ``--variants`` takes."""


@dataclass(frozen=True)
class Clocks:
    """Options of the recipe ``two-clocks``. T is ``ticks``."""

    data: str = option("mnist", "Digits to draw from.", ("mnist", "digits"))
    variants: tuple[str, ...] = option(tuple(NAMES), "How the networks learn, one or more.", NAMES)
    ticks: int = option(4, "T: the digits of a window, and the windows of a period.")
    width: int = option(128, "Units of every layer, and size of a message. The paper has 256.")
    batch: int = option(64, "Streams in parallel.")
    windows: int = option(25000, "Windows to train on, a multiple of T. The default is the paper's 100,000 digits.")
    scale: float = option(5.0, "Factor of the synthetic gradients. The paper has 10.")
    estimator_width: int = option(256, "Units of the estimator's hidden layer.")
    lr: float = option(1e-4, "Learning rate of Adam.")
    slow_lr: float | None = option(None, "Learning rate of the slow network. By default the same.")
    estimator_lr: float = option(3e-5, "Learning rate of the estimator.")
    seeds: int = option(1, "Runs of each variant.")
    seed: int = option(0, "The first seed. The other runs count up from it.")
    evaluate_every: int = option(500, "Measure and save a checkpoint every so many windows, a multiple of T.")
    test_periods: int = option(5, "Periods of 250 test streams in each measurement.")
    threads: int = option(0, "CPU threads of torch; 0 keeps the present number.")
    out: Path | None = option(  # noqa: RUF009
        None, "Folder for results, curves and checkpoints. The same command resumes there."
    )
    log_dir: Path | None = option(None, BOARD)  # noqa: RUF009


def check(options: Clocks) -> None:
    """Raise OptionError if a value is out of its range."""
    counts = ("width", "windows", "estimator_width", "seeds", "evaluate_every", "test_periods")
    check_least(options, {**dict.fromkeys(counts, 1), "batch": 2, "ticks": 2})
    check_given(options, ("variants",))
    check_rates(options, ("lr", "slow_lr", "estimator_lr"))
    for name in ("windows", "evaluate_every"):
        value = getattr(options, name)
        if value % options.ticks:
            raise OptionError(f"{flag(name)}: got {value}, expected a multiple of --ticks {options.ticks}")
