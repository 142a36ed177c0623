"""Two networks that tick at different rates: trained jointly, decoupled by synthetic gradients, and with none between them."""

import json
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import dnifx
from dnifx.errors import LossError, OptionError
from dnifx.zoo.data import Split, load
from dnifx.zoo.recipes.base import Recipe, option
from dnifx.zoo.recipes.live import Line, live
from dnifx.zoo.recipes.pictures import picture
from dnifx.zoo.recipes.results import Point, device_name, versions
from dnifx.zoo.recipes.store import Checkpoint, write_whole
from dnifx.zoo.two_clocks import DigitStreams, TwoClocks, count_errors, count_loss, zero_state

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = ("joint", "dni", "cdni", "none")
NAMES = {"joint": "joint backprop", "dni": "DNI", "cdni": "cDNI", "none": "no gradient"}
TEST_STREAMS = 250
TEST_SEED = 20170806
"""Of the streams of test digits, which are the same at every measurement of every arm."""


@dataclass(frozen=True)
class Clocks:
    """Options of the recipe ``two-clocks``."""

    data: str = option("mnist", "digits to draw from", ("mnist", "digits"))
    arms: tuple[str, ...] = option(ARMS, "how the networks learn, one or more", ARMS)
    ticks: int = option(4, "T: digits of a window, and windows of a period")
    width: int = option(128, "units of every layer, and size of a message; the paper has 256")
    batch: int = option(64, "streams in parallel")
    windows: int = option(
        25000, "windows of T digits to train on, a multiple of T; these are the paper's 100,000 digits"
    )
    scale: float = option(5.0, "what the synthetic gradient of a message is multiplied by; the paper has 10")
    estimator_width: int = option(256, "units of the estimator's one hidden layer")
    lr: float = option(1e-4, "learning rate of Adam")
    slow_lr: float | None = option(None, "learning rate of the slow network, where it is another")
    estimator_lr: float = option(3e-5, "learning rate of the estimator")
    seeds: int = option(1, "runs of each arm")
    seed: int = option(0, "the first seed; the others follow it")
    evaluate_every: int = option(500, "windows from one measurement (and checkpoint) to the next, a multiple of T")
    test_periods: int = option(5, "periods of 250 test streams that each measurement reads")
    threads: int = option(0, "threads of torch; 0 leaves them as they are")
    out: Path | None = option(None, "folder for results, curves and the checkpoints to resume from")  # noqa: RUF009


@dataclass(frozen=True)
class ClockPoint:
    """One place on the curves.

    Attributes:
        digits: Digits that each stream has shown so far: the paper's data time.
        loss: Mean training loss of the slow network over the periods since the point before.
        odd: How often the fast network's count was wrong, in percent of test windows.
        threes: How often the slow network's was, in percent of test periods.
    """

    digits: int
    loss: float
    odd: float
    threes: float


@dataclass(frozen=True)
class ClockRun:
    """One arm trained from one seed: the errors of the last measurement, and the curves."""

    seed: int
    odd: float
    threes: float
    seconds: float
    curve: tuple[ClockPoint, ...]


@dataclass(frozen=True)
class ClockArm:
    """One way to train both networks."""

    arm: str
    runs: tuple[ClockRun, ...] = ()

    @property
    def name(self) -> str:
        """As tables show it."""
        return NAMES[self.arm]


@dataclass(frozen=True)
class ClockResults:
    """All that an experiment found, and what is needed to run it again."""

    title: str
    command: str
    options: Mapping[str, Any]
    arms: tuple[ClockArm, ...]
    device: str
    versions: Mapping[str, str]

    def __rich__(self) -> Table:
        digits = self.arms[0].runs[0].curve[-1].digits
        seeds = ", ".join(str(run.seed) for run in self.arms[0].runs)
        caption = f"test errors after {digits:,} digits a stream; seeds {seeds}"
        table = Table(title=self.title, caption=caption, title_justify="left", caption_justify="left")
        for column in ("trained by", "A, odd digits, error %", "B, threes, error %", "A at 10% by", "digits/s"):
            table.add_column(column, justify="left" if column == "trained by" else "right")
        for arm in self.arms:
            odd, threes = (statistics.fmean(getattr(run, name) for run in arm.runs) for name in ("odd", "threes"))
            reached = [first_at(run.curve, 10.0) for run in arm.runs]
            speed = statistics.fmean(digits / max(run.seconds, 1e-9) for run in arm.runs)
            table.add_row(arm.name, f"{odd:.2f}", f"{threes:.2f}", mean_of(reached), f"{speed:,.0f}")
        return table

    def to_folder(self, folder: Path) -> None:
        """Write ``results.json`` and ``curves.png`` into ``folder``.

        Raises:
            DataError: Where matplotlib is absent; the JSON is written first.
        """
        content = json.dumps(asdict(self), indent=2, default=str)
        write_whole(folder / "results.json", lambda part: part.write_text(content + "\n"))
        self._draw(folder / "curves.png")

    def _draw(self, path: Path) -> None:
        with picture(path, self.title, (10, 4)) as figure:
            titles = ("A: odd digits in the last window", "B: threes in the last period")
            for axes, name, title in zip(figure.subplots(1, 2), ("odd", "threes"), titles, strict=True):
                for index, arm in enumerate(self.arms):
                    _draw_arm(axes, arm, name, f"C{index}")
                axes.set(xlabel="digits a stream (data time)", ylabel="test error %", title=title, ylim=(0, None))
                axes.grid(alpha=0.3)
                axes.legend()


def _draw_arm(axes: "Axes", arm: ClockArm, name: str, colour: str) -> None:
    digits = [point.digits for point in arm.runs[0].curve]
    columns = list(zip(*([getattr(point, name) for point in run.curve] for run in arm.runs), strict=True))
    axes.plot(digits, [statistics.fmean(column) for column in columns], color=colour, label=arm.name)
    if len(arm.runs) > 1:
        axes.fill_between(
            digits, [min(one) for one in columns], [max(one) for one in columns], color=colour, alpha=0.15
        )


def first_at(curve: tuple[ClockPoint, ...], error: float) -> int | None:
    """Return the digits after which the fast network's error was first at most ``error``, or None."""
    return next((point.digits for point in curve if point.odd <= error), None)


def mean_of(places: Sequence[int | None]) -> str:
    """Return the mean of the places as a table shows it, and how many there are where some are not."""
    known = [place for place in places if place is not None]
    if not known:
        return "never"
    missing = f" ({len(known)} of {len(places)})" if len(known) < len(places) else ""
    return f"{statistics.fmean(known):,.0f}{missing}"


def run(options: Clocks, console: Console | None = None) -> ClockResults:
    """Train every arm from every seed, and measure both errors along the way on streams of test digits.

    From one seed all arms begin with the same weights and see the same digits. The joint arm runs both networks through a
    whole period and updates them once; the others update the fast network in every window, the slow one once a period.

    Args:
        options: What to train.
        console: Where progress and results are shown; nowhere by default.

    Raises:
        DataError: Where the data cannot be had.
        OptionError: Where an option has no meaning here.
        StateError: Where ``options.out`` holds checkpoints of another run.
    """
    console = console or Console(quiet=True)
    check(options)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        results = ClockResults(
            title=f"Two clocks, T = {options.ticks}, {options.width} units, {options.data}",
            command=TWO_CLOCKS.command(options),
            options=asdict(options),
            arms=train_all(options, console),
            device=device_name(torch.device("cpu")),
            versions=versions(),
        )
    finally:
        torch.set_num_threads(threads)
    console.print(results)
    if options.out is not None:
        results.to_folder(options.out)
        console.print(f"results.json and curves.png are in {options.out}")
    return results


def train_all(options: Clocks, console: Console) -> tuple[ClockArm, ...]:
    """Train every arm from every seed."""
    train, test = (load(options.data, split).flat() for split in ("train", "test"))
    found: dict[str, list[ClockRun]] = {arm: [] for arm in options.arms}
    seeds = range(options.seed, options.seed + options.seeds)
    names = {NAMES[arm]: len(seeds) for arm in options.arms}
    with live(console, names, options.windows) as shown:
        for seed in seeds:
            for arm in options.arms:
                with torch.random.fork_rng(devices=[]):
                    training = Training(options, arm, seed, train, test)
                    found[arm].append(training.train(shown.line(NAMES[arm], seed)))
    return tuple(ClockArm(arm, tuple(runs)) for arm, runs in found.items())


def check(options: Clocks) -> None:
    """Raise OptionError where a value is out of its range."""
    for name in ("width", "windows", "estimator_width", "seeds", "evaluate_every", "test_periods"):
        if getattr(options, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected 1 or more")
    if options.batch < 2 or options.ticks < 2 or not options.arms:
        raise OptionError(
            f"--batch, --ticks, --arms: got {options.batch}, {options.ticks}, {options.arms}; expected 2 or more, and an arm"
        )
    for name in ("windows", "evaluate_every"):
        if getattr(options, name) % options.ticks:
            raise OptionError(
                f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected a multiple of --ticks {options.ticks}"
            )
    for name in ("lr", "slow_lr", "estimator_lr"):
        rate = getattr(options, name)
        if rate is not None and rate <= 0:
            raise OptionError(f"--{name.replace('_', '-')}: got {rate}, expected a rate above 0, as 1e-3")


class Learner(ABC):
    """How both networks learn from a period of digits."""

    @abstractmethod
    def period(self, streams: DigitStreams) -> torch.Tensor:
        """Train on the next period and return the slow network's loss."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that the next periods depend on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""


class Joint(Learner):
    """Backpropagation through both networks and a whole period; states are carried, detached, to the next."""

    def __init__(self, options: Clocks, model: TwoClocks) -> None:
        self.model = model
        groups: list[dict[str, Any]] = [
            {"params": list(model.fast.parameters())},
            {"params": list(model.slow.parameters()), "lr": options.slow_lr or options.lr},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=options.lr)
        self.states = [zero_state(options.batch, options.width) for _ in range(2)]

    def period(self, streams: DigitStreams) -> torch.Tensor:
        """Train on the next period and return the slow network's loss."""
        digits, odd, threes = streams.period()
        said_odd, said_threes, *states = self.model(digits, *self.states)
        slow = count_loss(said_threes, threes)
        self.optimizer.zero_grad()
        (count_loss(said_odd, odd) + slow).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.states = [(hidden.detach(), memory.detach()) for hidden, memory in states]
        return slow.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer and states."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.states = [tuple(each) for each in state["states"]]


class Decoupled(Learner):
    """The fast network learns in every window, the slow one once a period, with or without a synthetic gradient between.

    Args:
        options: What is trained.
        model: Both networks.
        gradient: The estimator of the messages' gradient.
        labelled: Whether it sees, beside a message, the slow network's label of that moment: the threes of the last T windows.
    """

    def __init__(self, options: Clocks, model: TwoClocks, gradient: Any, labelled: bool) -> None:
        digits = torch.rand(options.ticks, options.batch, model.fast.pixels)
        states = [zero_state(options.batch, options.width) for _ in range(2)]
        counts = model.slow.readout.out_features
        net = dnifx.decouple(
            model,
            ["fast", dnifx.Recurrent("fast_state", "2"), dnifx.Recurrent("slow_state", "3")],
            every={"slow": dnifx.Every(options.ticks, scale=options.scale)},
            args=(digits, *states),
            gradient={"fast": gradient, "*_state": "zero"},
            context=ThreesUntilNow(counts) if labelled else None,
            num_classes=counts if labelled else None,
            loss={"fast": odd_loss, "slow": count_loss},
        )
        adam = torch.optim.Adam
        self.trainer = net.trainer(
            {"submod_0": partial(adam, lr=options.lr), "submod_1": partial(adam, lr=options.slow_lr or options.lr)},
            estimator_optimizer=partial(adam, lr=options.estimator_lr),
        )
        self.ticks = options.ticks

    def period(self, streams: DigitStreams) -> torch.Tensor:
        """Train on the windows of the next period and return the slow network's loss."""
        for _ in range(self.ticks):
            digits, odd, threes = streams.window()
            result = self.trainer.step(digits, target={"fast": (odd, threes), "slow": threes})
        return result.losses["slow"]

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.trainer.load_state_dict(state)


def odd_loss(logits: torch.Tensor, target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the fast network's loss: ``count_loss`` of the first of its target's two counts, the odd digits."""
    return count_loss(logits, target[0])


@dataclass(frozen=True)
class ThreesUntilNow:
    """The second of the fast network's target's two counts, the threes of the last T windows, as one-hot features.

    Attributes:
        width: Of the features, T T + 1.
    """

    width: int

    def __call__(self, target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return features [batch, width]."""
        return functional.one_hot(target[1], self.width)


class Training:
    """One arm from one seed, in stretches that can be interrupted and taken up again bit for bit.

    Args:
        options: What is trained.
        arm: How.
        seed: Of weights and digits.
        train: Digits to train on.
        test: Digits to measure on.
    """

    def __init__(self, options: Clocks, arm: str, seed: int, train: Split, test: Split) -> None:
        self.options, self.arm, self.seed, self.test = options, arm, seed, test
        torch.manual_seed(seed)
        self.model = TwoClocks(train.inputs.size(1), options.width, options.ticks)
        self.learner = self.make_learner()
        self.streams = DigitStreams(train, options.batch, options.ticks, seed)
        self.windows, self.seconds = 0, 0.0
        self.curve: list[ClockPoint] = []

    def make_learner(self) -> Learner:
        """Return how the arm learns."""
        if self.arm == "joint":
            return Joint(self.options, self.model)
        synthetic = dnifx.estimators.Synthetic(hidden=1, width=self.options.estimator_width)
        return Decoupled(self.options, self.model, "zero" if self.arm == "none" else synthetic, self.arm == "cdni")

    def train(self, line: Line) -> ClockRun:
        """Train to the end and return how it went; of a run that went on further before, the part up to there."""
        checkpoint = self.checkpoint()
        state = checkpoint.load() if checkpoint is not None else None
        if state is not None:
            self.load_state_dict(state)
        line.step(self.windows)
        while self.windows < self.options.windows:
            self.stretch(min(self.options.evaluate_every, self.options.windows - self.windows), line)
            if checkpoint is not None:
                checkpoint.save(self.state_dict())
        end = self.options.windows * self.options.ticks
        curve = tuple(point for point in self.curve if point.digits <= end)
        share = end / self.curve[-1].digits
        return ClockRun(self.seed, curve[-1].odd, curve[-1].threes, self.seconds * share, curve)

    def stretch(self, count: int, line: Line) -> None:
        """Train for some windows and measure."""
        begin, total = time.perf_counter(), torch.zeros(())
        for _ in range(count // self.options.ticks):
            total = total + self.learner.period(self.streams)
            self.windows += self.options.ticks
            line.step(self.windows)
        self.seconds += time.perf_counter() - begin
        loss = float(total) * self.options.ticks / count
        if not math.isfinite(loss):
            raise LossError(f"the slow network's loss is {loss} by window {self.windows}; give a lower --lr")
        streams = DigitStreams(self.test, TEST_STREAMS, self.options.ticks, TEST_SEED)
        odd, threes = count_errors(self.model, streams, self.options.test_periods)
        self.curve.append(ClockPoint(self.windows * self.options.ticks, loss, odd, threes))
        line.point(Point(self.windows, loss, threes))

    def checkpoint(self) -> Checkpoint | None:
        """Return where the run is saved, if anywhere."""
        if self.options.out is None:
            return None
        apart = {"arms", "seeds", "seed", "windows", "threads", "out"}
        depends = {name: value for name, value in asdict(self.options).items() if name not in apart}
        path = self.options.out / "checkpoints" / f"{self.arm}-{self.seed}.pt"
        return Checkpoint(path, {**depends, "arm": self.arm, "seed": self.seed})

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next stretches depend on."""
        return {
            "learner": self.learner.state_dict(),
            "streams": self.streams.state_dict(),
            "windows": self.windows,
            "seconds": self.seconds,
            "curve": [asdict(point) for point in self.curve],
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.learner.load_state_dict(state["learner"])
        self.streams.load_state_dict(state["streams"])
        self.windows, self.seconds = state["windows"], state["seconds"]
        self.curve = [ClockPoint(**point) for point in state["curve"]]
        torch.set_rng_state(state["random"])


TWO_CLOCKS = Recipe(
    "two-clocks",
    "two networks that tick at different rates: joint backprop, DNI, cDNI, and no gradient between",
    Clocks,
    run,
)
