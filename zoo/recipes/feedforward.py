"""Train the paper's feed-forward networks by backprop, with no gradient, and by synthetic gradients, side by side."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import torch
from rich.console import Console

from dnifx.errors import OptionError
from dnifx.zoo.batches import Batches
from dnifx.zoo.data import Split, load
from dnifx.zoo.recipes.base import Recipe
from dnifx.zoo.recipes.learners import Arm, arms, decoupled, learner, network
from dnifx.zoo.recipes.live import Live, live
from dnifx.zoo.recipes.results import ArmResult, Results, Run, device_name, versions
from dnifx.zoo.recipes.settings import Feedforward, Settings, complete
from dnifx.zoo.recipes.store import Checkpoint
from dnifx.zoo.recipes.training import Learner, Progress, error_rate, train

_NOT_OF_A_RUN = frozenset({"gradient", "context", "seeds", "seed", "out"})


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
    with _threads(settings.threads):
        try:
            trained = _train_all(settings, splits[0], splits[1], console)
        except KeyboardInterrupt:
            console.print(_interrupted(settings))
            raise
        results = _measure(options, settings, trained, _read(settings, "test").to(device), device)
    console.print(results)
    if settings.out is not None:
        results.to_folder(settings.out)
        console.print(f"results.json and curves.png are in {settings.out}")
    return results


Trained = Mapping[tuple[Arm, int], tuple[Learner, Progress]]


def _train_all(settings: Settings, examples: Split, validation: Split, console: Console) -> Trained:
    seeds, chosen = settings.all_seeds, arms(settings)
    trained = {}
    devices = range(torch.cuda.device_count())
    with live(console, [arm.name for arm in chosen], settings.steps, seeds) as shown:
        for seed in seeds:
            for arm in chosen:
                with torch.random.fork_rng(devices):
                    trained[arm, seed] = _train(settings, arm, seed, examples, validation, shown)
    return trained


def _train(
    settings: Settings, arm: Arm, seed: int, examples: Split, validation: Split, shown: Live
) -> tuple[Learner, Progress]:
    torch.manual_seed(seed)
    batches = Batches(examples, settings.batch, seed)
    trainee = learner(settings, arm, examples.inputs[: settings.batch])
    return trainee, train(
        trainee,
        batches,
        validation,
        steps=settings.steps,
        every=settings.evaluate_every,
        watcher=shown.line(arm.name, seed),
        checkpoint=_checkpoint(settings, arm, seed),
    )


def _measure(options: Feedforward, settings: Settings, trained: Trained, test: Split, device: torch.device) -> Results:
    recipe = CNN_RECIPE if settings.net == "cnn" else FCN_RECIPE
    return Results(
        title=f"{settings.net.upper()} of {settings.layers} layers on {settings.data}",
        command=recipe.command(options),
        options=asdict(settings),
        arms=tuple(_arm_result(settings, arm, trained, test) for arm in arms(settings)),
        device=device_name(device),
        versions=versions(),
        steps=settings.steps,
    )


def _arm_result(settings: Settings, arm: Arm, trained: Trained, test: Split) -> ArmResult:
    runs = []
    for seed in settings.all_seeds:
        trainee, progress = trained[arm, seed]
        error = error_rate(trainee.model, test)
        runs.append(Run(seed, error, progress.curve[-1].error, progress.seconds, progress.curve))
    return ArmResult(arm.name, arm.gradient, arm.context, tuple(runs))


def _show(settings: Settings, examples: Split, console: Console) -> None:
    for arm in arms(settings):
        if arm.gradient == "synthetic":
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                net = decoupled(settings, arm, network(settings), examples.inputs[: settings.batch].cpu())
            console.print(f"{arm.name}:", net)
            return


def _read(settings: Settings, split: str) -> Split:
    examples = load(settings.data, split, validation=settings.validation)
    return examples.flat() if settings.net == "fcn" else examples


def _checkpoint(settings: Settings, arm: Arm, seed: int) -> Checkpoint | None:
    if settings.out is None:
        return None
    depends = {name: value for name, value in asdict(settings).items() if name not in _NOT_OF_A_RUN}
    path = settings.out / "checkpoints" / f"{arm.key}-{seed}.pt"
    return Checkpoint(path, {**depends, "arm": arm.key, "seed": seed})


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


FCN_RECIPE = Recipe(
    "fcn", "the fully connected network: backprop, no gradient, DNI and cDNI", Feedforward, run, {"net": "fcn"}
)
CNN_RECIPE = Recipe(
    "cnn", "the convolutional network: backprop, no gradient, DNI and cDNI", Feedforward, run, {"net": "cnn"}
)
