"""Train the paper's feed-forward networks by backprop, with no gradient, and by every kind of interface, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dnifx.errors import OptionError
from dnifx.zoo.batches import Batches
from dnifx.zoo.data import Split, load
from dnifx.zoo.recipes.accelerated import accelerated
from dnifx.zoo.recipes.arms import CONTEXTUAL, Arm, arms, candidates, named
from dnifx.zoo.recipes.base import Recipe
from dnifx.zoo.recipes.diagnosis import Diagnosis
from dnifx.zoo.recipes.learners import decoupled, learner, network
from dnifx.zoo.recipes.live import Line, live
from dnifx.zoo.recipes.results import ArmResult, Results, Run, device_name, versions
from dnifx.zoo.recipes.settings import GRADIENTS, Feedforward, Settings, complete
from dnifx.zoo.recipes.store import Checkpoint
from dnifx.zoo.recipes.training import Progress, error_rate, train

_NOT_OF_A_RUN = frozenset(
    {
        *("gradient", "context", "layers", "position", "p", "seeds", "seed", "out", "step"),
        *("diagnose_every", "probe_every"),
        *("hidden", "lr", "estimator_lr", "plain_hidden", "plain_lr", "plain_estimator_lr", "decay"),
    }
)
"""Settings that a run does not depend on, or that its arm holds."""


def run(options: Feedforward, console: Console | None = None) -> Results:
    """Train every arm from every seed, then measure the test error of each.

    From one seed, all arms start with the same weights and see the same batches. The test set is read once, after the
    last step of the last arm. With ``options.out``, results and curves are written there, and a run that was
    interrupted goes on where it was, bit for bit, when it is run again with the same options.

    Args:
        options: What to train.
        console: Where partitions, progress and the table of results are shown; nowhere by default.

    Raises:
        DataError: Where the data cannot be had.
        OptionError: Where an option has no meaning here.
        StateError: Where ``options.out`` holds checkpoints of another run.
    """
    console = console or Console(quiet=True)
    settings = complete(options)
    device = _device(settings.device)
    splits = [_read(settings, name).to(device) for name in ("train", "validation")]
    _show(settings, splits[0], console)
    with _torch(settings):
        try:
            trained = _train_all(settings, splits[0], splits[1], console)
        except KeyboardInterrupt:
            console.print(_interrupted(settings))
            raise
        results = _measure(options, settings, trained, _read(settings, "test").to(device), device)
    console.print(results)
    if settings.out is not None:
        *files, last = results.to_folder(settings.out)
        console.print(f"{', '.join(files)} and {last} are in {settings.out}")
    return results


@dataclass(frozen=True)
class Trained:
    """One run of one arm.

    Attributes:
        arm: The arm, with everything chosen.
        model: The network.
        progress: How its training went.
        diagnosis: How good its synthetic gradients were.
    """

    arm: Arm
    model: nn.Module
    progress: Progress
    diagnosis: Diagnosis

    @property
    def error(self) -> float:
        """Validation error after the last step, in percent."""
        return self.progress.curve[-1].error


Runs = Mapping[tuple[Arm, int], Sequence[Trained]]
"""By arm and seed, what was trained: one run, or one for each candidate that validation chooses from."""


def _train_all(settings: Settings, examples: Split, validation: Split, console: Console) -> Runs:
    first, *others = settings.all_seeds
    wanted = arms(settings)
    counts = {named(arm, settings): len(candidates(arm, settings)) + len(others) for arm in wanted}
    runs: dict[tuple[Arm, int], Sequence[Trained]] = {}
    with live(console, counts, settings.steps) as shown:

        def trained(arm: Arm, chosen: Arm, seed: int) -> Trained:
            line = shown.line(named(arm, settings), seed)
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                return _train(settings, chosen, seed, examples, validation, line)

        for arm in wanted:
            runs[arm, first] = [trained(arm, each, first) for each in candidates(arm, settings)]
        for seed in others:
            for arm in wanted:
                runs[arm, seed] = [trained(arm, _best(runs[arm, first]).arm, seed)]
    return runs


def _best(runs: Sequence[Trained]) -> Trained:
    return min(runs, key=lambda one: one.error)


def _train(settings: Settings, arm: Arm, seed: int, examples: Split, validation: Split, line: Line) -> Trained:
    torch.manual_seed(seed)
    batches = Batches(examples, settings.batch, seed)
    device = examples.inputs.device
    trainee = learner(settings, arm, examples.inputs[: settings.batch], seed)
    sample = (validation.inputs[: settings.batch], validation.targets[: settings.batch])
    every = (settings.diagnose_every, settings.probe_every) if arm.guesses else (0, 0)
    diagnosis = Diagnosis(sample, *every)
    progress = train(
        accelerated(trainee, settings.step, arm.p is not None, device),
        batches,
        validation,
        steps=settings.steps,
        every=settings.evaluate_every,
        watcher=line,
        diagnosis=diagnosis,
        checkpoint=_checkpoint(settings, arm, seed),
    )
    return Trained(arm, trainee.model, progress, diagnosis)


def _measure(options: Feedforward, settings: Settings, runs: Runs, test: Split, device: torch.device) -> Results:
    name = options.experiment or settings.net
    depth = f" of {settings.layers[0]} layers" if len(settings.layers) == 1 else ""
    return Results(
        title=f"{name}: {settings.net.upper()}{depth} on {settings.data}",
        command=FEEDFORWARD[name].command(options),
        options=asdict(settings),
        arms=tuple(_arm_result(settings, arm, runs, test) for arm in arms(settings)),
        device=device_name(device),
        versions=versions(),
        steps=settings.steps,
    )


def _arm_result(settings: Settings, arm: Arm, runs: Runs, test: Split) -> ArmResult:
    found = []
    for seed in settings.all_seeds:
        best = _best(runs[arm, seed])
        found.append(
            Run(
                seed,
                test_error=error_rate(best.model, test),
                validation_error=best.error,
                seconds=best.progress.seconds,
                curve=best.progress.curve,
                looks=tuple(best.diagnosis.looks),
                probes=tuple(best.diagnosis.probes),
                harms=tuple(best.diagnosis.harms),
            )
        )
    tried = runs[arm, settings.seed]
    choices = tuple((asdict(one.arm), one.error) for one in tried) if len(tried) > 1 else ()
    return ArmResult(named(arm, settings), arm.gradient, arm.context, tuple(found), asdict(_best(tried).arm), choices)


def _show(settings: Settings, examples: Split, console: Console) -> None:
    for arm in arms(settings):
        if arm.gradient in CONTEXTUAL:
            chosen = candidates(arm, settings)[0]
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                model = network(settings, settings.layers[0])
                net = decoupled(settings, chosen, model, examples.inputs[: settings.batch].cpu())
            console.print(f"{named(arm, settings)}:", net)
            return


def _read(settings: Settings, split: str) -> Split:
    examples = load(settings.data, split, validation=settings.validation)
    return examples.flat() if settings.net == "fcn" else examples


def _checkpoint(settings: Settings, arm: Arm, seed: int) -> Checkpoint | None:
    if settings.out is None:
        return None
    depends = {name: value for name, value in asdict(settings).items() if name not in _NOT_OF_A_RUN}
    path = settings.out / "checkpoints" / f"{arm.key}-seed={seed}.pt"
    return Checkpoint(path, {**depends, "arm": arm.key, "seed": seed})


@contextmanager
def _torch(settings: Settings) -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(settings.threads or threads)
    torch.set_float32_matmul_precision(settings.matmul)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device: got {name!r}, expected cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device: got {name!r}, but torch sees {torch.cuda.device_count()} GPUs; give --device cpu")
    return device


def _interrupted(settings: Settings) -> str:
    if settings.out is None:
        return "interrupted; give --out to be able to go on later"
    return f"interrupted; the same command goes on from the checkpoints in {settings.out}"


_NO_SCHEDULE = {"schedule": "sequential", "p": ()}


def _recipe(
    name: str, summary: str, fixed: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Recipe[Feedforward]:
    return Recipe(name, summary, Feedforward, run, {"experiment": name, **fixed}, defaults or {})


_ALL_RECIPES = (
    _recipe("fcn", "the fully connected network: backprop, no gradient, DNI and cDNI", {"net": "fcn"}),
    _recipe("cnn", "the convolutional network: backprop, no gradient, DNI and cDNI", {"net": "cnn"}),
    _recipe(
        "table1",
        "the paper's table of test errors by depth: no gradient, backprop, DNI, cDNI",
        {**_NO_SCHEDULE, "position": ()},
        {"data": "mnist", "layers": (3, 4, 5, 6), "gradient": ("zero", "backprop", "synthetic")},
    ),
    _recipe(
        "single",
        "one interface at each position of a network of 6 layers, and the cut with nothing in its place",
        _NO_SCHEDULE,
        {"data": "mnist", "layers": (6,), "position": (1, 2, 3, 4, 5), "context": ("none",)},
    ),
    _recipe(
        "sparse",
        "updates with probability p in random order, 4 layers, DNI and cDNI",
        {"schedule": "random_order", "target": "scheduled", "position": ()},
        {"data": "mnist", "layers": (4,), "gradient": ("synthetic",), "p": (0.05, 0.1, 0.2, 0.5, 1.0)},
    ),
    _recipe(
        "unlock",
        "synthetic inputs and gradients: every layer runs with probability p, forward and backward in any order",
        {"schedule": "unlocked", "target": "scheduled", "position": ()},
        {"data": "mnist", "layers": (4,), "gradient": ("synthetic",), "hidden": (1,), "p": (0.1, 0.2, 0.5, 1.0)},
    ),
    _recipe(
        "deep",
        "21 layers by backprop and cDNI",
        {**_NO_SCHEDULE, "position": ()},
        {"data": "mnist", "layers": (21,), "gradient": ("backprop", "synthetic"), "context": ("label",)},
    ),
    _recipe(
        "stale",
        "the average of past gradients, its decay chosen on validation, against no gradient, by depth",
        {**_NO_SCHEDULE, "position": (), "context": ("none",)},
        {
            "data": "mnist",
            "layers": (3, 4, 5, 6),
            "gradient": ("zero", "stale"),
            "decay": (0.0, 0.5, 0.9, 0.99, 0.999),
        },
    ),
    _recipe(
        "estimators",
        "every kind of interface side by side",
        {**_NO_SCHEDULE, "target": "scheduled"},
        {"data": "mnist", "gradient": GRADIENTS, "context": ("label",)},
    ),
)

FEEDFORWARD: Mapping[str, Recipe[Feedforward]] = MappingProxyType({recipe.name: recipe for recipe in _ALL_RECIPES})
"""The feed-forward recipes by name."""
