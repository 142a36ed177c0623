"""Experiments on the paper's feed-forward networks, with every kind of interface side by side.

DNI stands for decoupled neural interfaces, which train by synthetic gradients. In cDNI the
estimators also see the label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from rich.console import Console
from torch import nn

from dnifx.zoo.batches import Batches
from dnifx.zoo.data import Split, load
from dnifx.zoo.recipes.accelerated import accelerated
from dnifx.zoo.recipes.diagnosis import Diagnosis
from dnifx.zoo.recipes.learners import decoupled, learner, network
from dnifx.zoo.recipes.length import check_length
from dnifx.zoo.recipes.live import Line, live
from dnifx.zoo.recipes.machine import device_name, find_device, torch_settings, versions
from dnifx.zoo.recipes.outputs import prepare
from dnifx.zoo.recipes.ranks import Processes
from dnifx.zoo.recipes.registry import RECIPES
from dnifx.zoo.recipes.report import report
from dnifx.zoo.recipes.results import Results, Run, VariantResult
from dnifx.zoo.recipes.settings import Feedforward, Settings, complete
from dnifx.zoo.recipes.store import checkpoint_of
from dnifx.zoo.recipes.training import Progress, error_rate, train
from dnifx.zoo.recipes.variants import CONTEXTUAL, Variant, candidates, named, variants

_NOT_OF_A_RUN = frozenset(
    {
        *("gradient", "context", "layers", "position", "p", "seeds", "seed", "step"),
        *("diagnose_every", "probe_every", "places"),
        *("hidden", "lr", "estimator_lr", "head_lr", "plain_hidden", "plain_lr", "plain_estimator_lr", "decay"),
    }
)
"""Settings that a run does not depend on, or that its variant holds."""

_OF_ITS_LENGTH = frozenset({"steps", "lr_drops", "evaluate_every"})
"""Settings that may be others when a run goes on, as long as no step that is made would have been another."""


def run(options: Feedforward, console: Console | None = None) -> Results:
    """Train every variant from every seed, then measure the test error of each.

    From one seed, all variants start with the same weights and see the same batches. The test set
    is read once, after the last step of the last variant. Results, curves and checkpoints are
    written to ``options.out``. An interrupted run resumes there bit for bit when it is started again
    with the same options. With more steps a finished run goes on, and equals a run of that length.

    Args:
        options: What to train.
        console: Shows partitions, progress and the table of results. By default nothing is shown.

    Raises:
        DataError: The data set is not available.
        OptionError: An option is out of its range or does not fit the others, or ``options.out`` cannot be written to.
        StateError: ``options.out`` holds checkpoints of another run.
    """
    settings = complete(options)
    processes = Processes(settings.places == "ranks")
    processes.join()
    console = console if console and processes.is_first else Console(quiet=True)
    processes.told(lambda: prepare(settings.out))
    device = find_device(settings.device)
    splits = [_read(settings, name).to(device) for name in ("train", "validation")]
    _show(settings, splits[0], console)
    with torch_settings(settings.threads, settings.matmul):
        try:
            trained = _train_all(settings, splits[0], splits[1], console, processes)
        except (KeyboardInterrupt, SystemExit):
            console.print(_interrupted(settings))
            raise
        results = _measure(options, settings, trained, _read(settings, "test").to(device), device)
    processes.told(lambda: report(results, settings.out, console))
    return results


@dataclass(frozen=True)
class Trained:
    """One run of one variant.

    Attributes:
        variant: The variant, with every value chosen.
        model: The network.
        progress: The progress of its training.
        diagnosis: The quality of its synthetic gradients.
    """

    variant: Variant
    model: nn.Module
    progress: Progress
    diagnosis: Diagnosis

    @property
    def error(self) -> float:
        """Validation error after the last step, in percent."""
        return self.progress.curve[-1].error


Runs = Mapping[tuple[Variant, int], Sequence[Trained]]
"""The runs, by variant and seed: a single one, or one for each candidate of validation."""


def _train_all(settings: Settings, examples: Split, validation: Split, console: Console, processes: Processes) -> Runs:
    first, *others = settings.all_seeds
    wanted = variants(settings)
    counts = {named(variant, settings): len(candidates(variant, settings)) + len(others) for variant in wanted}
    runs: dict[tuple[Variant, int], Sequence[Trained]] = {}
    with live(console, counts, settings.steps, settings.log_dir) as shown:

        def trained(variant: Variant, chosen: Variant, seed: int) -> Trained:
            line = shown.line(named(variant, settings), seed)
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                return _train(settings, chosen, seed, examples, validation, line, processes)

        for variant in wanted:
            runs[variant, first] = [trained(variant, each, first) for each in candidates(variant, settings)]
        for seed in others:
            for variant in wanted:
                runs[variant, seed] = [trained(variant, _best(runs[variant, first]).variant, seed)]
    return runs


def _best(runs: Sequence[Trained]) -> Trained:
    return min(runs, key=lambda one: one.error)


def _train(
    settings: Settings,
    variant: Variant,
    seed: int,
    examples: Split,
    validation: Split,
    line: Line,
    processes: Processes,
) -> Trained:
    torch.manual_seed(seed)
    batches = Batches(examples, settings.batch, seed)
    device = examples.inputs.device
    trainee = learner(settings, variant, examples.inputs[: settings.batch], seed)
    sample = (validation.inputs[: settings.batch], validation.targets[: settings.batch])
    every = (settings.diagnose_every, settings.probe_every) if variant.guesses else (0, 0)
    diagnosis = Diagnosis(sample, *every)
    own = {"variant": variant.key, "seed": seed}
    if variant.gradient == "backprop" and processes.several:
        own["places"] = settings.places
    checkpoint = checkpoint_of(settings, _NOT_OF_A_RUN, f"{variant.key}-seed={seed}", own)
    if checkpoint is not None:
        checkpoint = replace(checkpoint, free=_OF_ITS_LENGTH, allow=partial(check_length, settings))
    progress = train(
        accelerated(trainee, settings.step, variant.p is not None or settings.lag != 0, device),
        batches,
        validation,
        steps=settings.steps,
        every=settings.evaluate_every,
        watcher=line,
        diagnosis=diagnosis,
        checkpoint=processes.shared(checkpoint),
    )
    return Trained(variant, trainee.model, progress, diagnosis)


def _measure(options: Feedforward, settings: Settings, runs: Runs, test: Split, device: torch.device) -> Results:
    name = options.experiment or settings.net
    depth = f" of {settings.layers[0]} layers" if len(settings.layers) == 1 else ""
    return Results(
        title=f"{name}: {settings.net.upper()}{depth} on {settings.data}",
        command=RECIPES[name].command(options),
        options=asdict(settings),
        variants=tuple(_variant_result(settings, variant, runs, test) for variant in variants(settings)),
        device=device_name(device),
        versions=versions(),
        steps=settings.steps,
    )


def _variant_result(settings: Settings, variant: Variant, runs: Runs, test: Split) -> VariantResult:
    found = []
    for seed in settings.all_seeds:
        best = _best(runs[variant, seed])
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
    tried = runs[variant, settings.seed]
    choices = tuple((asdict(one.variant), one.error) for one in tried) if len(tried) > 1 else ()
    chosen = asdict(_best(tried).variant)
    return VariantResult(
        named(variant, settings), variant.gradient, variant.context, tuple(found), chosen, candidates=choices
    )


def _show(settings: Settings, examples: Split, console: Console) -> None:
    for variant in variants(settings):
        if variant.gradient in CONTEXTUAL:
            chosen = candidates(variant, settings)[0]
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                model = network(settings, settings.layers[0])
                net = decoupled(settings, chosen, model, examples.inputs[: settings.batch].cpu())
            console.print(f"{named(variant, settings)}:", net)
            return


def _read(settings: Settings, split: str) -> Split:
    examples = load(settings.data, split, validation=settings.validation)
    return examples.flat() if settings.net == "fcn" else examples


def _interrupted(settings: Settings) -> str:
    if settings.out is None:
        return "interrupted; with --out you could resume"
    return f"interrupted; the same command resumes from the checkpoints in {settings.out}"
