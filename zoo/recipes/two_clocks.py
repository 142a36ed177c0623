"""Two networks that tick at different rates, trained jointly and decoupled.

The fast network A reads digits and sends a message after each window. The slow network B reads the
messages of a whole period. In DNI an estimator gives A the gradient of its message at once. In cDNI
the estimator also sees B's label.
"""

from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor

import dnifx
from dnifx.zoo.data import Split, load
from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.machine import device_name, torch_settings, versions
from dnifx.zoo.recipes.outputs import prepare
from dnifx.zoo.recipes.registry import RECIPES
from dnifx.zoo.recipes.report import report
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.resumable import Resumable, train_each
from dnifx.zoo.recipes.store import checkpoint_of
from dnifx.zoo.recipes.two_clocks_learners import ClockLearner, Decoupled, Joint
from dnifx.zoo.recipes.two_clocks_options import NAMES, Clocks, check
from dnifx.zoo.recipes.two_clocks_results import ClockPoint, ClockResults, ClockRun, ClockVariant
from dnifx.zoo.two_clocks import DigitStreams, TwoClocks, count_errors

TEST_STREAMS = 250
TEST_SEED = 20170806
"""Seed of the test streams. Every measurement of every variant reads the same streams."""


def run(options: Clocks, console: Console | None = None) -> ClockResults:
    """Train every variant from every seed, and measure both networks' errors on test digits.

    From one seed all variants begin with the same weights and see the same digits. Joint backprop
    updates both networks once a period. The others update the fast network in every window and the
    slow network once a period.

    Args:
        options: What to train.
        console: Shows progress and results. By default nothing is shown.

    Raises:
        DataError: The data set is not available.
        OptionError: An option is out of its range, or ``options.out`` cannot be written to.
        StateError: ``options.out`` holds checkpoints of another run.
    """
    console = console or Console(quiet=True)
    check(options)
    prepare(options.out)
    with torch_settings(options.threads):
        results = ClockResults(
            title=f"Two clocks, T = {options.ticks}, {options.width} units, {options.data}",
            command=RECIPES["two-clocks"].command(options),
            options=asdict(options),
            variants=_train_all(options, console),
            device=device_name(torch.device("cpu")),
            versions=versions(),
        )
    report(results, options.out, console)
    return results


def _train_all(options: Clocks, console: Console) -> tuple[ClockVariant, ...]:
    train, test = (load(options.data, split).flat() for split in ("train", "test"))

    def trained(place: int, seed: int, line: Line) -> ClockRun:
        return ClockTraining(options, options.variants[place], seed, train, test).run(line)

    seeds = range(options.seed, options.seed + options.seeds)
    found = train_each(
        [NAMES[key] for key in options.variants], seeds, options.windows, console, trained, options.log_dir
    )
    return tuple(ClockVariant(key, runs) for key, runs in zip(options.variants, found, strict=True))


class ClockTraining(Resumable[ClockPoint]):
    """One variant from one seed. A step of the run is a window.

    Args:
        options: What to train.
        variant: The variant, as ``--variants`` names it.
        seed: Seed of weights and digits.
        train: Digits to train on.
        test: Digits to measure on.
    """

    point = ClockPoint
    parts = ("learner", "streams")
    plain = ("windows",)

    def __init__(self, options: Clocks, variant: str, seed: int, train: Split, test: Split) -> None:
        self.options, self.variant, self.seed, self.test = options, variant, seed, test
        torch.manual_seed(seed)
        self.model = TwoClocks(train.inputs.size(1), options.width, options.ticks)
        self.learner = self._learner()
        self.streams = DigitStreams(train, options.batch, options.ticks, seed)
        self.stride, self.windows = options.ticks, 0

    def _learner(self) -> ClockLearner:
        if self.variant == "joint":
            return Joint(self.options, self.model)
        synthetic = dnifx.estimators.Synthetic(hidden=1, width=self.options.estimator_width)
        gradient = "zero" if self.variant == "none" else synthetic
        return Decoupled(self.options, self.model, gradient, self.variant == "cdni")

    @property
    def steps(self) -> int:
        """Windows done."""
        return self.windows

    def run(self, line: Line) -> ClockRun:
        """Train to the end and return the run. A checkpoint beyond the end is cut off there."""
        apart = {"variants", "seeds", "seed", "windows", "threads"}
        own = {"variant": self.variant, "seed": self.seed}
        checkpoint = checkpoint_of(self.options, apart, f"{self.variant}-{self.seed}", own)
        self.train(self.options.windows, self.options.evaluate_every, checkpoint, line)
        end = self.options.windows * self.options.ticks
        curve = tuple(point for point in self.curve if point.digits <= end)
        share = end / self.curve[-1].digits
        return ClockRun(self.seed, curve[-1].odd, curve[-1].threes, self.seconds * share, curve)

    def step(self) -> Tensor:
        """Train on the windows of the next period and return the slow network's loss."""
        loss = self.learner.period(self.streams)
        self.windows += self.options.ticks
        return loss

    def measure(self, loss: float, line: Line) -> ClockPoint:
        """Measure both errors on the test streams."""
        streams = DigitStreams(self.test, TEST_STREAMS, self.options.ticks, TEST_SEED)
        odd, threes = count_errors(self.model, streams, self.options.test_periods)
        line.point(Point(self.windows, loss, threes))
        return ClockPoint(self.windows * self.options.ticks, loss, odd, threes)
