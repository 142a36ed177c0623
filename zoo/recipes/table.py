"""What the partitions of a network can learn from, side by side: a residual network, a transformer, a language model.

All variants begin with the same weights and see the same batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor

from dnifx.schedules import Lock, backprop, locks
from dnifx.zoo.recipes.live import Line, live
from dnifx.zoo.recipes.machine import device_name, torch_settings, versions
from dnifx.zoo.recipes.outputs import prepare
from dnifx.zoo.recipes.registry import RECIPES
from dnifx.zoo.recipes.report import report
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.resumable import Resumable
from dnifx.zoo.recipes.store import checkpoint_of
from dnifx.zoo.recipes.table_costs import Costs, costs_of
from dnifx.zoo.recipes.table_gradients import parameter_cosines
from dnifx.zoo.recipes.table_learners import TableLearner, Variant, candidates, learner
from dnifx.zoo.recipes.table_options import NAMES, Table, complete
from dnifx.zoo.recipes.table_results import TableResults, TableRun, TableVariant
from dnifx.zoo.recipes.table_tasks import Task, task_of

_NOT_OF_A_RUN = frozenset({"variants", "lr", "head_lr", "seeds", "seed", "threads", "late"})
"""Settings that a run does not depend on, or that its variant holds."""


def run(options: Table, console: Console | None = None) -> TableResults:
    """Train every variant from every seed, then measure each on the test part.

    From one seed, all variants start with the same weights and see the same batches. Where there are several rates,
    validation chooses each variant's from its first seed. The test part is read once, after the last step of the last
    variant. Results, curves and checkpoints are written to ``options.out``. An interrupted run resumes there bit for bit
    when it is started again with the same options.

    Args:
        options: What to train.
        console: Shows the cuts, progress and the table of results. By default nothing is shown.

    Raises:
        DataError: The data set is not available.
        OptionError: An option is out of its range or does not fit the others, or ``options.out`` cannot be written to.
        StateError: ``options.out`` holds checkpoints of another run.
    """
    console = console or Console(quiet=True)
    settings = complete(options)
    prepare(settings.out)
    task = task_of(settings)
    with torch_settings(settings.threads, settings.matmul):
        runs = _train_all(settings, task, console)
        results = TableResults(
            title=f"{settings.model} on {settings.text or settings.data}, cut after {', '.join(settings.cuts or ())}",
            unit=task.unit,
            relative=task.relative,
            command=RECIPES["table"].command(options),
            options=asdict(settings),
            variants=tuple(_variant(settings, key, runs, task) for key in settings.variants),
            device=device_name(torch.device("cpu")),
            versions=versions(),
            steps=settings.steps,
        )
    report(results, settings.out, console)
    return results


class TableTraining(Resumable[Point]):
    """One variant from one seed.

    Args:
        settings: The options, complete.
        variant: The way to learn, with its rates.
        seed: Seed of weights and batches.
        task: Network and data.
    """

    point = Point
    parts = ("learner", "stream")
    plain = ("done_steps",)

    def __init__(self, settings: Table, variant: Variant, seed: int, task: Task) -> None:
        self.settings, self.variant, self.seed, self.task = settings, variant, seed, task
        torch.manual_seed(seed)
        self.learner = learner(settings, variant, task)
        self.stream, self.done_steps = task.stream(seed), 0

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.done_steps

    def run(self, line: Line) -> "TableTraining":
        """Train to the end."""
        name = f"{self.variant.key}-{self.variant.lr:g}-{self.variant.head_lr:g}-seed={self.seed}"
        own = {**asdict(self.variant), "seed": self.seed}
        if self.variant.key == "late":
            own["late"] = self.settings.late
        checkpoint = checkpoint_of(self.settings, _NOT_OF_A_RUN, name, own)
        self.train(self.settings.steps, self.settings.evaluate_every, checkpoint, line)
        return self

    def step(self) -> Tensor:
        """Train on the next batch and return the loss."""
        self.done_steps += 1
        return self.learner.step(*self.stream.next())

    def measure(self, loss: float, line: Line) -> Point:
        """Measure the score on the validation part."""
        point = Point(self.steps, loss, self.task.score(self.learner.model, "validation"))
        line.point(point, self.task.unit)
        return point


Runs = Mapping[tuple[str, int], Sequence[TableTraining]]
"""The runs by variant and seed: one, or one for each candidate of validation."""


def _train_all(settings: Table, task: Task, console: Console) -> Runs:
    first, *others = range(settings.seed, settings.seed + settings.seeds)
    choices = {key: candidates(key, settings) for key in settings.variants}
    runs: dict[tuple[str, int], Sequence[TableTraining]] = {}
    counts = {NAMES[key]: len(each) + len(others) for key, each in choices.items()}
    with live(console, counts, settings.steps, settings.log_dir) as shown:

        def trained(variant: Variant, seed: int) -> TableTraining:
            with torch.random.fork_rng(devices=[]):
                training = TableTraining(settings, variant, seed, task)
                return training.run(shown.line(NAMES[variant.key], seed))

        for key in settings.variants:
            runs[key, first] = [trained(each, first) for each in choices[key]]
        for seed in others:
            for key in settings.variants:
                runs[key, seed] = [trained(best(runs[key, first]).variant, seed)]
    return runs


def best(runs: Sequence[TableTraining]) -> TableTraining:
    """Return the run with the lowest score on the validation part."""
    return min(runs, key=lambda one: one.curve[-1].error)


def _variant(settings: Table, key: str, runs: Runs, task: Task) -> TableVariant:
    found = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        one = best(runs[key, seed])
        score, held_out = task.score(one.learner.model, "test"), task.held_out()
        cosines = {} if key == "late" else parameter_cosines(one.learner, *held_out)
        found.append(TableRun(seed, score, one.curve[-1].error, one.seconds, tuple(one.curve), cosines))
    tried = runs[key, settings.seed]
    chosen = best(tried).variant
    with torch.random.fork_rng(devices=[]):
        fresh = learner(settings, chosen, task)
    return TableVariant(
        key,
        tuple(found),
        costs_of_step(fresh, task),
        removed_locks(fresh),
        asdict(chosen),
        tuple((asdict(each.variant), each.curve[-1].error) for each in tried) if len(tried) > 1 else (),
    )


def costs_of_step(fresh: TableLearner, task: Task) -> Costs:
    """Return what a training step costs, after a first one, which does more. The learner is trained by both."""
    inputs, targets = task.held_out()
    fresh.step(inputs, targets)
    return costs_of(lambda: fresh.step(inputs, targets), fresh.net)


def removed_locks(fresh: TableLearner) -> Mapping[str, int]:
    """Return of how many partitions a learner's schedule removes each lock of backpropagation."""
    program = fresh.net.program
    before, after = locks(backprop(program), program), locks(fresh.schedule, program)
    freed = [lock for one, other in zip(before, after, strict=True) for lock in one - other]
    return {str(lock): freed.count(lock) for lock in Lock if lock in freed}
