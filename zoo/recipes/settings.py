"""The options of the feed-forward recipes, and the values that a recipe chooses."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dnifx.errors import OptionError
from dnifx.zoo.recipes.base import BOARD, option
from dnifx.zoo.recipes.checks import check_given, check_least, check_rates

DATA = ("digits", "mnist", "fashion", "cifar10")
GRADIENTS = (
    "backprop",
    "zero",
    "stale",
    "synthetic",
    "oracle",
    "sigmoid_linear",
    "critic",
    "sobolev",
    "local_loss",
    "direct_feedback",
    "bplambda",
    "prop",
)
SCHEDULES = ("sequential", "random_order", "unlocked")
STEPS = ("auto", "eager", "graph", "compiled")


@dataclass(frozen=True)
class Feedforward:
    """Options of the feed-forward recipes. Network, data set and budget choose what is None."""

    experiment: str = option("", "Name of the recipe. By default the network's name.")
    net: str = option("fcn", "Network to train.", ("fcn", "cnn"))
    data: str = option("digits", "Data set.", DATA)
    layers: tuple[int, ...] | None = option(None, "Number of layers, including the classifier. Several: 3,5 or 3..6.")
    width: int | None = option(None, "Units or filters of a hidden layer.")
    gradient: tuple[str, ...] = option(
        ("backprop", "zero", "synthetic"), "What the hidden layers learn from. One variant for each.", GRADIENTS
    )
    context: tuple[str, ...] = option(
        ("none", "label"),
        "What the estimators see beside the activation: none (DNI) or label (cDNI). One variant for each.",
        ("none", "label"),
    )
    position: tuple[int, ...] = option(
        (), "Put the only interface after this hidden layer. One variant for each, such as 1..5."
    )
    schedule: str = option("sequential", "Order of the work in a step.", SCHEDULES)
    p: tuple[float, ...] = option((), "Update probability of a random schedule. One variant for each.")
    lag: str = option(
        "0", "Fit the estimators to the targets of so many steps ago. With --places ranks: a number, or auto."
    )
    places: str = option(
        "here",
        "Where the partitions run: here, in one process, or ranks, in the processes that torchrun started.",
        ("here", "ranks"),
    )
    hidden: tuple[int, ...] | None = option(
        None, "Hidden layers of an estimator; 0 is an affine map. Validation chooses among several."
    )
    estimator_width: int | None = option(None, "Units or filters of an estimator's hidden layer.")
    decay: tuple[float, ...] = option((0.9,), "Decay of stale gradients. Validation chooses among several.")
    budget: str = option("small", "Steps and rates: for a small machine, or the paper's.", ("small", "paper"))
    steps: int | None = option(None, "Training steps. With more than before, a run in --out goes on.")
    batch: int | None = option(None, "Examples in a step.")
    lr: tuple[float, ...] | None = option(None, "Learning rate of Adam. Validation chooses among several.")
    estimator_lr: tuple[float, ...] | None = option(
        None, "Learning rate of the estimators. Validation chooses among several."
    )
    head_lr: tuple[float, ...] | None = option(
        None,
        "Learning rate of the heads: the classifiers of local_loss, critic and sobolev. Validation chooses among several.",
    )
    lr_drops: tuple[float, ...] | None = option(
        None, "Divide the rates by 10 after these shares of the steps, such as 0.6,0.8."
    )
    seeds: int | None = option(None, "Runs of each variant. The table shows their mean and spread.")
    seed: int = option(0, "The first seed. The other runs count up from it.")
    validation: int | None = option(None, "Training examples held out to measure the validation error.")
    evaluate_every: int | None = option(None, "Measure the validation error and save a checkpoint every so many steps.")
    diagnose_every: int | None = option(
        None,
        "Compare the synthetic gradients with the gradients they are fitted to every so many steps; 0: never.",
    )
    probe_every: int = option(
        0, "Compare them with the true gradient, on a validation batch, every so many steps; 0: never."
    )
    target: str = option(
        "scheduled", "What to compile: one fused module, or a scheduled trainer.", ("fused", "scheduled")
    )
    device: str = option("cpu", "Device to train on: cpu, cuda or cuda:1.")
    step: str = option("auto", "How a step runs on a GPU; auto takes the fastest.", STEPS)
    threads: int | None = option(None, "CPU threads of torch; 0 keeps the present number.")
    matmul: str = option(
        "highest",
        "Precision of matrix products, as in torch.set_float32_matmul_precision.",
        ("highest", "high", "medium"),
    )
    out: Path | None = option(None, "Folder for results, curves and checkpoints. The same command resumes there.")  # noqa: RUF009
    log_dir: Path | None = option(None, BOARD)  # noqa: RUF009


@dataclass(frozen=True)
class Tuned:
    """The rates and the size for one kind of interface, from validation or from the paper.

    Attributes:
        lr: Learning rate of the network.
        estimator_lr: Learning rate of the estimators.
        hidden: Number of hidden layers of an estimator.
    """

    lr: float
    estimator_lr: float
    hidden: int


@dataclass(frozen=True)
class Preset:
    """The values that the recipe chooses for one network on one data set.

    Attributes:
        layers: Number of layers, including the classifier.
        width: Units or filters of a hidden layer.
        plain: The rates for synthetic gradients without context.
        other: The rates for everything else.
        estimator_width: Units or filters of an estimator's hidden layer.
        steps: Training steps.
        batch: Examples in a step.
        seeds: Runs of each variant.
        validation: Training examples held out.
        threads: CPU threads; 1 if the work of a step is too small to share.
        heads: Learning rate of heads; None: that of the estimators in ``other``.
    """

    layers: int
    width: int
    plain: Tuned
    other: Tuned
    estimator_width: int
    steps: int
    batch: int
    seeds: int
    validation: int
    threads: int = 0
    heads: float | None = None


_SMALL = Tuned(1e-3, 1e-3, 0)
_DEEP = Tuned(1e-4, 5e-4, 1)
"""Replaces a preset's ``other`` above ten layers; chosen on 21 layers and MNIST."""
_UNLOCKED = Tuned(3e-4, 3e-3, 1)
"""Replaces it if every partition runs on synthetic inputs; chosen on 4 layers and MNIST."""

_MNIST_FCN = Preset(4, 256, Tuned(3e-5, 1e-3, 2), _SMALL, 512, 6000, 256, 1, 5000)
_MNIST_CNN = Preset(3, 64, Tuned(3e-4, 3e-3, 1), _SMALL, 64, 2000, 128, 1, 5000)

PRESETS: Mapping[tuple[str, str], Preset] = MappingProxyType(
    {
        ("fcn", "digits"): Preset(4, 128, Tuned(3e-4, 3e-4, 1), Tuned(3e-4, 3e-4, 0), 256, 1500, 64, 3, 180, threads=1),
        ("fcn", "mnist"): _MNIST_FCN,
        ("fcn", "fashion"): _MNIST_FCN,
        ("fcn", "cifar10"): Preset(5, 1000, Tuned(1e-5, 1e-3, 2), Tuned(1e-4, 1e-3, 0), 1000, 2000, 256, 1, 5000),
        ("cnn", "digits"): Preset(3, 16, Tuned(1e-3, 1e-3, 1), _SMALL, 32, 1000, 64, 3, 180, threads=1),
        ("cnn", "mnist"): _MNIST_CNN,
        ("cnn", "fashion"): _MNIST_CNN,
        ("cnn", "cifar10"): Preset(
            3, 128, Tuned(3e-4, 3e-3, 1), Tuned(3e-4, 1e-5, 0), 128, 2000, 128, 1, 5000, heads=1e-3
        ),
    }
)
"""The paper's networks, smaller for the digits, with steps and rates for a small machine.

The keys are network and data set.
"""

PAPER_ESTIMATORS: Mapping[tuple[str, str], tuple[int, int, int]] = MappingProxyType(
    {
        ("fcn", "mnist"): (2, 0, 1024),
        ("fcn", "fashion"): (2, 0, 1024),
        ("fcn", "cifar10"): (1, 1, 4000),
        ("cnn", "mnist"): (2, 0, 64),
        ("cnn", "fashion"): (2, 0, 64),
        ("cnn", "cifar10"): (2, 0, 128),
    }
)
"""The paper's estimators (appendix A.1), by network and data set.

The values are the number of hidden layers without a label, the number with one, and their width.
"""

LONGER: Mapping[str, int] = MappingProxyType({"random_order": 4, "unlocked": 2})
"""Factors by which the small budget's steps grow for schedules in which most partitions rest."""


@dataclass(frozen=True)
class Settings:
    """Options with nothing left open. ``Feedforward`` explains each one.

    Attributes:
        hidden, lr, estimator_lr: For everything except synthetic gradients without context.
        plain_hidden, plain_lr, plain_estimator_lr: For synthetic gradients without context.
        head_lr: In place of ``estimator_lr`` for heads.
    """

    net: str
    data: str
    layers: tuple[int, ...]
    width: int
    gradient: tuple[str, ...]
    context: tuple[str, ...]
    position: tuple[int, ...]
    schedule: str
    p: tuple[float, ...]
    lag: int | Literal["auto"]
    places: str
    hidden: tuple[int, ...]
    plain_hidden: tuple[int, ...]
    estimator_width: int
    decay: tuple[float, ...]
    steps: int
    batch: int
    lr: tuple[float, ...]
    plain_lr: tuple[float, ...]
    estimator_lr: tuple[float, ...]
    plain_estimator_lr: tuple[float, ...]
    head_lr: tuple[float, ...]
    lr_drops: tuple[float, ...]
    seeds: int
    seed: int
    validation: int
    evaluate_every: int
    diagnose_every: int
    probe_every: int
    target: str
    device: str
    step: str
    threads: int
    matmul: str
    out: Path | None
    log_dir: Path | None

    @property
    def all_seeds(self) -> range:
        """The seeds of each variant's runs."""
        return range(self.seed, self.seed + self.seeds)


def complete(options: Feedforward) -> Settings:
    """Return the options with a value for everything that they leave open.

    If only the network's learning rate is given, the estimators use it too. Heads use what is given for estimators.

    Raises:
        OptionError: A value is out of its range.
    """
    chosen = _chosen(options)
    given = vars(options)
    rates = given["lr"] if given["estimator_lr"] is None else given["estimator_lr"]
    plain = {"plain_hidden": given["hidden"], "plain_lr": given["lr"], "plain_estimator_lr": rates}
    heads = rates if given["head_lr"] is None else given["head_lr"]
    asked = {**given, **plain, "estimator_lr": rates, "head_lr": heads}
    names = [one.name for one in fields(Settings)]
    values: dict[str, Any] = {name: chosen.get(name) if asked.get(name) is None else asked[name] for name in names}
    settings = Settings(**{**values, "lag": read_lag(options.lag)})
    _check(settings)
    return settings


def read_lag(text: str) -> int | Literal["auto"]:
    """Read a lag: a number of steps, or ``auto``.

    Raises:
        OptionError: It is neither.
    """
    if text == "auto":
        return "auto"
    if not str(text).isdecimal():
        raise OptionError(f"--lag: got {text}, expected 0 or more, or auto with --places ranks")
    return int(text)


def _chosen(options: Feedforward) -> dict[str, Any]:
    preset = _preset(options)
    steps = options.steps or preset.steps * (LONGER.get(options.schedule, 1) if options.budget == "small" else 1)
    rarest = min((p for p in options.p if p > 0), default=1.0)
    both = {f"plain_{name}": (value,) for name, value in asdict(preset.plain).items()}
    both |= {name: (value,) for name, value in asdict(preset.other).items()}
    return {
        **asdict(preset),
        **both,
        "head_lr": (preset.other.estimator_lr if preset.heads is None else preset.heads,),
        "layers": (preset.layers,),
        "steps": steps,
        "lr_drops": (0.6, 0.8),
        # Long enough that only one of 10^8 stretches passes without a loss from the last partition.
        "evaluate_every": min(steps, max(1, steps // 20, math.ceil(20 / rarest) if options.p else 1)),
        "diagnose_every": max(10, steps // 200),
    }


def _deep(preset: Preset) -> Preset:
    """Return the preset above ten layers: estimators as wide as the layers, twice the steps."""
    return replace(preset, other=_DEEP, estimator_width=preset.width, steps=2 * preset.steps)


def _preset(options: Feedforward) -> Preset:
    preset = PRESETS[options.net, options.data]
    if options.budget == "small":
        if options.schedule == "unlocked":
            return replace(preset, other=_UNLOCKED)
        return _deep(preset) if min(options.layers or (preset.layers,)) > 10 else preset
    hidden, labelled, width = PAPER_ESTIMATORS.get(
        (options.net, options.data), (preset.plain.hidden, preset.other.hidden, preset.estimator_width)
    )
    return replace(
        preset,
        plain=Tuned(3e-5, 3e-5, hidden),
        other=Tuned(3e-5, 3e-5, labelled),
        heads=None,
        estimator_width=width,
        steps=500_000,
        batch=256,
    )


_LEAST = {
    **dict.fromkeys(("position", "width", "estimator_width", "steps", "seeds", "validation", "evaluate_every"), 1),
    **dict.fromkeys(("hidden", "diagnose_every", "probe_every", "threads"), 0),
    **dict.fromkeys(("layers", "batch"), 2),
}


def _check(settings: Settings) -> None:
    check_least(settings, _LEAST)
    check_given(settings, ("layers", "gradient", "context", "hidden", "decay", "lr", "estimator_lr", "head_lr"))
    check_rates(settings, ("lr", "estimator_lr", "head_lr"))
    for drop in settings.lr_drops:
        if not 0 < drop < 1:
            raise OptionError(f"--lr-drops: got {drop}, expected shares of the steps between 0 and 1, such as 0.6,0.8")
    _check_variants(settings)


def _check_variants(settings: Settings) -> None:
    deepest = min(settings.layers) - 1
    if settings.position and max(settings.position) > deepest:
        raise OptionError(
            f"--position: got {max(settings.position)}, but a network of {min(settings.layers)} layers has {deepest} "
            f"hidden layers; give 1..{deepest}"
        )
    if bool(settings.p) != (settings.schedule != "sequential"):
        raise OptionError(
            f"--p: got {settings.p or 'no value'} for --schedule {settings.schedule}; random_order and unlocked need "
            "update probabilities, such as 0.2; sequential takes none"
        )
    if settings.places == "ranks" and (settings.target == "fused" or settings.probe_every):
        given = (
            "--probe-every needs all weights in one process" if settings.probe_every else "--target fused is one module"
        )
        raise OptionError(f"--places: over ranks each process trains its own partitions, and {given}; leave it out")
    if settings.lag == "auto" and settings.places != "ranks":
        raise OptionError("--lag: auto measures the links between ranks; give a number, or --places ranks")
    if settings.lag and settings.target == "fused":
        raise OptionError(f"--target: fused knows no lag, got --lag {settings.lag}; leave --target out")
    if settings.schedule != "sequential" and settings.target == "fused":
        raise OptionError(f"--target: fused has no schedule, got --schedule {settings.schedule}; leave --target out")
