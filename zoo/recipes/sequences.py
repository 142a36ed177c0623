"""Copy, Repeat Copy and character models: truncated backpropagation and synthetic gradients, for several window lengths."""

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from dnifx.errors import LossError, OptionError
from dnifx.zoo.charlm import Text, TextStream, bits_per_character, read_text, tiny_shakespeare
from dnifx.zoo.copy_task import CopyStream
from dnifx.zoo.recipes.base import Recipe, option
from dnifx.zoo.recipes.live import live
from dnifx.zoo.recipes.pictures import picture
from dnifx.zoo.recipes.results import Point, device_name, versions
from dnifx.zoo.recipes.store import Checkpoint, write_whole
from dnifx.zoo.sequence import SequenceNetwork

ARMS = ("bptt", "dni", "dni-aux")
NAMES = {"bptt": "BPTT", "dni": "DNI", "dni-aux": "DNI+Aux"}


@dataclass(frozen=True)
class Sequences:
    """Options of the recipes ``copy``, ``repeat-copy`` and ``charlm``."""

    task: str = option("copy", "task", ("copy", "repeat-copy", "charlm"))
    unroll: tuple[int, ...] = option((3,), "steps of a window, one or more")
    arms: tuple[str, ...] = option(ARMS, "how windows are joined, one or more", ARMS)
    text: tuple[Path, ...] = option(
        (), "charlm: three files of text (train, validation, test) in place of tiny Shakespeare"
    )
    width: int | None = option(None, "units of the LSTM")
    batch: int = option(256, "streams read in parallel")
    scale: float = option(0.1, "what synthetic gradients are multiplied by")
    steps: int = option(10000, "training steps, of one window each, at most")
    lr: float = option(7e-5, "learning rate of Adam")
    estimator_lr: float = option(7e-5, "learning rate of the estimators, whatever the network's")
    seeds: int = option(1, "runs of each arm")
    seed: int = option(0, "the first seed; the others follow it")
    evaluate_every: int = option(1000, "steps from one measurement (and checkpoint) to the next")
    out: Path | None = option(None, "folder for results, curves and the checkpoints to resume from")  # noqa: RUF009


class Task(Protocol):
    """What a network is trained on."""

    better: int
    """1 where a higher score is better, -1 where a lower one is."""

    def network(self, width: int) -> nn.Module:
        """Return a fresh network."""

    def window(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return the next inputs and classes."""

    def learned(self, logits: Tensor, targets: Tensor) -> None:
        """Be told what the network said of a window."""

    def score(self, model: nn.Module, width: int) -> float:
        """Return the score that curves show."""

    def final(self, model: nn.Module, width: int) -> float:
        """Return the score that is reported."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""


class CopyTask(CopyStream):
    """Copying; the score is the longest task that was solved."""

    better = 1

    def network(self, width: int) -> nn.Module:
        """Return a fresh network."""
        return SequenceNetwork(self.inputs, width, self.outputs)

    def score(self, model: nn.Module, width: int) -> float:
        """Return the longest task that was solved, 0 before the first."""
        return float(self.solved)

    def final(self, model: nn.Module, width: int) -> float:
        """Return the longest task that was solved."""
        return float(self.solved)


class TextTask(TextStream):
    """Predicting the next character; the score is bits per character of the validation part, reported those of the test part."""

    better = -1

    def __init__(self, text: Text, batch: int) -> None:
        super().__init__(text.train, batch)
        self.parts = text

    def network(self, width: int) -> nn.Module:
        """Return a fresh network."""
        count = len(self.parts.characters)
        return SequenceNetwork(count, width, count, embedded=True)

    def learned(self, logits: Tensor, targets: Tensor) -> None:
        """Take no note: the score is measured on another part."""

    def score(self, model: nn.Module, width: int) -> float:
        """Return the bits per character of the validation part."""
        return bits_per_character(model, self.parts.validation, width)

    def final(self, model: nn.Module, width: int) -> float:
        """Return the bits per character of the test part."""
        return bits_per_character(model, self.parts.test, width)


@dataclass(frozen=True)
class SequenceRun:
    """One arm trained from one seed.

    Attributes:
        seed: The seed.
        score: The score that is reported, of the best network.
        steps: Training steps run.
        seconds: Time that they took.
        curve: The score after each measurement.
    """

    seed: int
    score: float
    steps: int
    seconds: float
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class SequenceArm:
    """One way to join windows, and one length of them."""

    arm: str
    unroll: int
    runs: tuple[SequenceRun, ...] = ()

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{NAMES[self.arm]} T={self.unroll}"

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return statistics.fmean(run.score for run in self.runs)


@dataclass(frozen=True)
class SequenceResults:
    """All that an experiment found, and what is needed to run it again."""

    title: str
    unit: str
    command: str
    options: Mapping[str, Any]
    arms: tuple[SequenceArm, ...]
    device: str
    versions: Mapping[str, str]

    def __rich__(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column in ("arm", self.unit, "by seed", "steps", "steps/s"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for arm in self.arms:
            each = ", ".join(f"{run.score:.4g}" for run in arm.runs)
            speed = statistics.fmean(run.steps / max(run.seconds, 1e-9) for run in arm.runs)
            steps = ", ".join(dict.fromkeys(f"{run.steps:,}" for run in arm.runs))
            table.add_row(arm.name, f"{arm.mean:.4g}", each, steps, f"{speed:,.0f}")
        return table

    def to_folder(self, folder: Path) -> None:
        """Write ``results.json`` and ``curves.png`` into ``folder``.

        Raises:
            DataError: Where matplotlib is absent; the JSON is written first.
        """
        content = json.dumps(
            {**asdict(self), "means": {arm.name: arm.mean for arm in self.arms}}, indent=2, default=str
        )
        write_whole(folder / "results.json", lambda part: part.write_text(content + "\n"))
        self._draw(folder / "curves.png")

    def _draw(self, path: Path) -> None:
        with picture(path, self.title, (7, 4)) as figure:
            axes = figure.subplots()
            for index, arm in enumerate(self.arms):
                for run in arm.runs:
                    label = arm.name if run is arm.runs[0] else None
                    axes.plot(
                        [p.step for p in run.curve],
                        [p.error for p in run.curve],
                        color=f"C{index}",
                        label=label,
                        alpha=0.8,
                    )
            axes.set(xlabel="steps", ylabel=self.unit)
            axes.grid(alpha=0.3)
            axes.legend()


def run(options: Sequences, console: Console | None = None) -> SequenceResults:
    """Train every arm at every window length from every seed.

    From one seed all arms begin with the same weights and see the same characters. Training stops after ``steps``, and for
    texts as soon as the validation score gets worse, as the paper's; reported is the best network's score.

    Args:
        options: What to train.
        console: Where progress and results are shown; nowhere by default.

    Raises:
        DataError: Where the text cannot be had.
        OptionError: Where an option has no meaning here.
        StateError: Where ``options.out`` holds checkpoints of another run.
    """
    console = console or Console(quiet=True)
    check(options)
    settings = replace(options, width=options.width or (1024 if options.task == "charlm" else 256))
    text = read(settings) if settings.task == "charlm" else None
    arms = [SequenceArm(arm, unroll) for unroll in settings.unroll for arm in settings.arms]
    seeds = range(settings.seed, settings.seed + settings.seeds)
    found: dict[str, list[SequenceRun]] = {arm.name: [] for arm in arms}
    with live(console, dict.fromkeys(found, len(seeds)), settings.steps) as shown:
        for seed in seeds:
            for arm in arms:
                with torch.random.fork_rng(devices=[]):
                    found[arm.name].append(Training(settings, arm, seed, text).train(shown.line(arm.name, seed)))
    results = SequenceResults(
        title=f"{settings.task}, LSTM of {settings.width} units, batch {settings.batch}",
        unit="bits per character" if settings.task == "charlm" else "longest task solved",
        command=RECIPE_OF[settings.task].command(options),
        options=asdict(settings),
        arms=tuple(replace(arm, runs=tuple(found[arm.name])) for arm in arms),
        device=device_name(torch.device("cpu")),
        versions=versions(),
    )
    console.print(results)
    if settings.out is not None:
        results.to_folder(settings.out)
        console.print(f"results.json and curves.png are in {settings.out}")
    return results


def check(options: Sequences) -> None:
    """Raise OptionError where a value is out of its range."""
    for name in ("width", "batch", "steps", "seeds", "evaluate_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
    if not options.unroll or min(options.unroll) < 1 or not options.arms:
        raise OptionError(
            f"--unroll, --arms: got {options.unroll}, {options.arms}; expected steps of 1 or more, and an arm"
        )
    for name in ("lr", "estimator_lr"):
        if getattr(options, name) <= 0:
            raise OptionError(
                f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected a rate above 0, as 7e-5"
            )


def read(options: Sequences) -> Text:
    """Return the text that the options name."""
    return read_text(options.text) if options.text else tiny_shakespeare()


class Training:
    """One arm from one seed, in steps that can be interrupted and taken up again bit for bit.

    Args:
        settings: What is trained; the width is chosen.
        arm: How.
        seed: Of weights and data.
        text: The text, for character models.
    """

    def __init__(self, settings: Sequences, arm: SequenceArm, seed: int, text: Text | None) -> None:
        self.settings, self.arm, self.seed = settings, arm, seed
        self.width = settings.width or 256
        repeat = settings.task == "repeat-copy"
        self.task: Task = TextTask(text, settings.batch) if text else CopyTask(repeat, settings.batch, seed)
        torch.manual_seed(seed)
        self.model = self.task.network(self.width)
        adam = torch.optim.Adam
        self.trainer = self.decoupled().trainer(
            partial(adam, lr=settings.lr), estimator_optimizer=partial(adam, lr=settings.estimator_lr)
        )
        self.curve: list[Point] = []
        self.seconds = 0.0
        self.best: dict[str, Tensor] | None = None
        self.done = False

    def decoupled(self) -> dnifx.DecoupledModule:
        """Return the network, cut in time as the arm says."""
        x = torch.zeros_like(self.fresh_window())
        zero = torch.zeros(1, self.settings.batch, self.width)
        cut = dnifx.Recurrent("state", "1", scale=self.settings.scale, auxiliary=self.arm.arm == "dni-aux")
        estimator: Any = "zero" if self.arm.arm == "bptt" else dnifx.estimators.SyntheticState(reads=(0,))
        return dnifx.decouple(self.model, cut, args=(x, (zero, zero)), gradient=estimator, loss=sequence_loss)

    def fresh_window(self) -> Tensor:
        """Return the inputs of one window, leaving the stream where it is."""
        place = self.task.state_dict()
        x, _ = self.task.window(self.arm.unroll)
        self.task.load_state_dict(place)
        return x

    def train(self, watcher: Any) -> SequenceRun:
        """Train to the end and return how it went."""
        checkpoint = self.checkpoint()
        state = checkpoint.load() if checkpoint is not None else None
        if state is not None:
            self.load_state_dict(state)
        watcher.step(self.trainer.steps)
        while self.trainer.steps < self.settings.steps and not self.done:
            self.stretch(min(self.settings.evaluate_every, self.settings.steps - self.trainer.steps), watcher)
            if checkpoint is not None:
                checkpoint.save(self.state_dict())
        if self.best is not None:
            self.model.load_state_dict(self.best)
        score = self.task.final(self.model, self.width)
        return SequenceRun(self.seed, score, self.trainer.steps, self.seconds, tuple(self.curve))

    def stretch(self, count: int, watcher: Any) -> None:
        """Train for some steps, measure, and keep the best network."""
        begin = time.perf_counter()
        total: Tensor | float = 0.0
        for _ in range(count):
            x, y = self.task.window(self.arm.unroll)
            result = self.trainer.step(x, target=y)
            self.task.learned(result.output[0], y)
            total = total + (result.loss if result.loss is not None else 0.0)
            watcher.step(self.trainer.steps)
        self.seconds += time.perf_counter() - begin
        if not math.isfinite(float(total)):
            raise LossError(f"the training loss is {float(total)} by step {self.trainer.steps}; give a lower --lr")
        before = [self.task.better * point.error for point in self.curve]
        score = self.task.score(self.model, self.width)
        self.curve.append(Point(self.trainer.steps, float(total) / count, score))
        if not before or self.task.better * score >= max(before):
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        elif self.task.better < 0:
            self.done = True

    def checkpoint(self) -> Checkpoint | None:
        """Return where the run is saved, if anywhere."""
        if self.settings.out is None:
            return None
        apart = {"arms", "unroll", "seeds", "seed", "out", "steps"}
        depends = {name: value for name, value in asdict(self.settings).items() if name not in apart}
        depends["text"] = list(map(str, depends["text"]))
        path = self.settings.out / "checkpoints" / f"{self.arm.arm}-{self.arm.unroll}-{self.seed}.pt"
        return Checkpoint(path, {**depends, "arm": self.arm.arm, "unroll": self.arm.unroll, "seed": self.seed})

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on."""
        return {
            "trainer": self.trainer.state_dict(),
            "task": self.task.state_dict(),
            "curve": [(point.step, point.loss, point.error) for point in self.curve],
            "seconds": self.seconds,
            "best": self.best,
            "done": self.done,
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.trainer.load_state_dict(state["trainer"])
        self.task.load_state_dict(state["task"])
        self.curve = [Point(*point) for point in state["curve"]]
        self.seconds, self.best, self.done = state["seconds"], state["best"], state["done"]
        torch.set_rng_state(state["random"])


def sequence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over streams of the cross entropy, summed over the steps of a window.

    Args:
        logits: [batch, steps, classes].
        targets: [batch, steps].
    """
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) * targets.size(1)


COPY = Recipe(
    "copy", "Copy: longest sequences solved, with and without DNI", Sequences, run, {"task": "copy", "text": ()}
)
REPEAT_COPY = Recipe(
    "repeat-copy", "Repeat Copy: as far up the ladder as it goes", Sequences, run, {"task": "repeat-copy", "text": ()}
)
CHARLM = Recipe(
    "charlm",
    "a character model: bits per character of tiny Shakespeare, or of any text",
    Sequences,
    run,
    {"task": "charlm"},
)
RECIPE_OF = {recipe.name: recipe for recipe in (COPY, REPEAT_COPY, CHARLM)}
"""The recipes of this module by name."""
