"""Copy, Repeat Copy and character models, at several window lengths.

A recurrent network reads its stream in windows of a few steps. BPTT is truncated backpropagation:
no gradient passes from a window to the one before. DNI estimates that gradient. DNI+Aux also
predicts the next estimate.
"""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

import dnifx
from dnifx.zoo.charlm import Text, read_text, tiny_shakespeare
from dnifx.zoo.recipes.checks import check_given, check_least, check_rates
from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.machine import device_name, versions
from dnifx.zoo.recipes.outputs import prepare
from dnifx.zoo.recipes.registry import RECIPES
from dnifx.zoo.recipes.report import report
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.resumable import Resumable, train_each
from dnifx.zoo.recipes.sequence_options import Sequences
from dnifx.zoo.recipes.sequence_results import SequenceResults, SequenceRun, SequenceVariant
from dnifx.zoo.recipes.sequence_tasks import CopyTask, Task, TextTask
from dnifx.zoo.recipes.store import checkpoint_of


def run(options: Sequences, console: Console | None = None) -> SequenceResults:
    """Train every variant at every window length from every seed.

    From one seed all variants begin with the same weights and see the same characters. Training
    stops after ``steps``. On texts it stops as soon as the validation score gets worse, as in the
    paper. The table shows the best network's score.

    Args:
        options: What to train.
        console: Shows progress and results. By default nothing is shown.

    Raises:
        DataError: The text is not available.
        OptionError: An option is out of its range, or ``options.out`` cannot be written to.
        StateError: ``options.out`` holds checkpoints of another run.
    """
    console = console or Console(quiet=True)
    check_least(options, dict.fromkeys(("unroll", "width", "batch", "steps", "seeds", "evaluate_every"), 1))
    check_given(options, ("unroll", "variants"))
    check_rates(options, ("lr", "estimator_lr"))
    prepare(options.out)
    settings = replace(options, width=options.width or (1024 if options.task == "charlm" else 256))
    text = _read(settings) if settings.task == "charlm" else None
    wanted = [SequenceVariant(key, unroll) for unroll in settings.unroll for key in settings.variants]

    def trained(place: int, seed: int, line: Line) -> SequenceRun:
        return SequenceTraining(settings, wanted[place], seed, text).run(line)

    seeds = range(settings.seed, settings.seed + settings.seeds)
    found = train_each([variant.name for variant in wanted], seeds, settings.steps, console, trained, settings.log_dir)
    results = SequenceResults(
        title=f"{settings.task}, LSTM of {settings.width} units, batch {settings.batch}",
        unit="bits per character" if text else "longest task solved",
        command=RECIPES[settings.task].command(options),
        options=asdict(settings),
        variants=tuple(replace(variant, runs=runs) for variant, runs in zip(wanted, found, strict=True)),
        device=device_name(torch.device("cpu")),
        versions=versions(),
    )
    report(results, settings.out, console)
    return results


def _read(options: Sequences) -> Text:
    return read_text(options.text) if options.text else tiny_shakespeare()


class SequenceTraining(Resumable[Point]):
    """One variant from one seed.

    Args:
        settings: The options, with the width chosen.
        variant: The way to join windows, and their length.
        seed: Seed of weights and data.
        text: The text, for character models.
    """

    point = Point
    parts = ("trainer", "task")
    plain = ("best", "done")

    def __init__(self, settings: Sequences, variant: SequenceVariant, seed: int, text: Text | None) -> None:
        self.settings, self.variant, self.seed = settings, variant, seed
        self.width = settings.width or 256
        repeat = settings.task == "repeat-copy"
        self.task: Task = TextTask(text, settings.batch) if text else CopyTask(repeat, settings.batch, seed)
        torch.manual_seed(seed)
        self.model = self.task.network(self.width)
        adam = torch.optim.Adam
        self.trainer = self._decoupled().trainer(
            partial(adam, lr=settings.lr), estimator_optimizer=partial(adam, lr=settings.estimator_lr)
        )
        self.best: dict[str, Tensor] | None = None

    def _decoupled(self) -> dnifx.DecoupledModule:
        """Return the network, cut in time as the variant says. The stream stays where it is."""
        place = self.task.state_dict()
        x, _ = self.task.window(self.variant.unroll)
        self.task.load_state_dict(place)
        zero = torch.zeros(1, self.settings.batch, self.width)
        cut = dnifx.Recurrent("state", "1", scale=self.settings.scale, auxiliary=self.variant.key == "dni-aux")
        estimator: Any = "zero" if self.variant.key == "bptt" else dnifx.estimators.SyntheticState(reads=(0,))
        args = torch.zeros_like(x), (zero, zero)
        return dnifx.decouple(self.model, cut, args=args, gradient=estimator, loss=sequence_loss)

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.trainer.steps

    def run(self, line: Line) -> SequenceRun:
        """Train to the end and return the run."""
        apart = {"variants", "unroll", "seeds", "seed", "steps", "text"}
        own = {"variant": self.variant.key, "unroll": self.variant.unroll, "seed": self.seed}
        text = {"text": list(map(str, self.settings.text))}
        checkpoint = checkpoint_of(self.settings, apart, "-".join(map(str, own.values())), {**text, **own})
        self.train(self.settings.steps, self.settings.evaluate_every, checkpoint, line)
        if self.best is not None:
            self.model.load_state_dict(self.best)
        score = self.task.final(self.model, self.width)
        return SequenceRun(self.seed, score, self.steps, self.seconds, tuple(self.curve))

    def step(self) -> Tensor | float:
        """Train on the next window and return the loss."""
        x, y = self.task.window(self.variant.unroll)
        result = self.trainer.step(x, target=y)
        self.task.learned(result.output[0], y)
        return 0.0 if result.loss is None else result.loss

    def measure(self, loss: float, line: Line) -> Point:
        """Measure the score, keep the best network, and stop if a text's score got worse."""
        before = [self.task.better * point.error for point in self.curve]
        score = self.task.score(self.model, self.width)
        if not before or self.task.better * score >= max(before):
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        elif self.task.better < 0:
            self.done = True
        point = Point(self.steps, loss, score)
        line.keep(point)
        return point


def sequence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy, summed over the steps of a window and averaged over the streams.

    Args:
        logits: [batch, steps, classes].
        targets: [batch, steps].
    """
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) * targets.size(1)
