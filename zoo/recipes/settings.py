"""The options of the feed-forward recipes, and what the recipe chooses where they leave it open."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dnifx.errors import OptionError
from dnifx.zoo.recipes.base import option

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
    """Options of the feed-forward recipes; None is chosen by the data set, the network and the budget."""

    experiment: str = option("", "the recipe's name; by default the network's")
    net: str = option("fcn", "network", ("fcn", "cnn"))
    data: str = option("digits", "data set", DATA)
    layers: tuple[int, ...] | None = option(None, "layers of the network, the classifier among them; 3..6 for several")
    width: int | None = option(None, "units (or filters) of a hidden layer")
    gradient: tuple[str, ...] = option(
        ("backprop", "zero", "synthetic"), "what the hidden layers learn from, one or more", GRADIENTS
    )
    context: tuple[str, ...] = option(
        ("none", "label"), "what synthetic gradients see beside the activation: one arm for each", ("none", "label")
    )
    position: tuple[int, ...] = option((), "hidden layers to put the only interface after, an arm for each; 1..5")
    schedule: str = option("sequential", "what a step runs, in which order", SCHEDULES)
    p: tuple[float, ...] = option((), "update probabilities of a drawn schedule, an arm for each")
    hidden: tuple[int, ...] | None = option(
        None, "hidden layers of an estimator; 0 is an affine map; of several, validation chooses"
    )
    estimator_width: int | None = option(None, "units (or filters) of an estimator's hidden layer")
    decay: tuple[float, ...] = option((0.9,), "decay of stale gradients; of several, validation chooses")
    budget: str = option("small", "steps and rates of a small machine, or those of the paper", ("small", "paper"))
    steps: int | None = option(None, "training steps")
    batch: int | None = option(None, "examples in a step")
    lr: tuple[float, ...] | None = option(None, "learning rate of Adam; of several, validation chooses")
    estimator_lr: tuple[float, ...] | None = option(
        None, "learning rate of the estimators; of several, validation chooses"
    )
    lr_drops: tuple[float, ...] | None = option(None, "shares of the steps after which the rate is cut by 10: 0.6,0.8")
    seeds: int | None = option(None, "runs of each arm, over which mean and spread are taken")
    seed: int = option(0, "the first seed; the others follow it")
    validation: int | None = option(None, "training examples held out for the validation error")
    evaluate_every: int | None = option(None, "steps from one validation (and checkpoint) to the next")
    diagnose_every: int | None = option(
        None,
        "steps from one look at the synthetic gradients, beside the gradients they are fitted to, to the next; 0: none",
    )
    probe_every: int = option(
        0, "steps from one comparison with the true gradient, on a validation batch, to the next; 0: none"
    )
    target: str = option(
        "scheduled", "what is compiled: one fused module, or a scheduled trainer", ("fused", "scheduled")
    )
    device: str = option("cpu", "where to train: cpu, cuda, cuda:1")
    step: str = option("auto", "how a step runs on a GPU; auto measures and takes the fastest", STEPS)
    threads: int | None = option(None, "CPU threads of torch; 0 leaves their number as it is")
    matmul: str = option(
        "highest",
        "precision of matrix products, as torch.set_float32_matmul_precision has it",
        ("highest", "high", "medium"),
    )
    out: Path | None = option(None, "folder for results, curves and the checkpoints to resume from")  # noqa: RUF009


@dataclass(frozen=True)
class Tuned:
    """What suits one kind of interface; chosen on validation examples, or the paper's.

    Attributes:
        lr: Learning rate of the network.
        estimator_lr: Learning rate of the estimators.
        hidden: Hidden layers of an estimator.
    """

    lr: float
    estimator_lr: float
    hidden: int


@dataclass(frozen=True)
class Preset:
    """What the recipe chooses for one network on one data set.

    Attributes:
        layers: Layers, the classifier among them.
        width: Units (or filters) of a hidden layer.
        plain: For synthetic gradients without context.
        other: For everything else.
        estimator_width: Units (or filters) of an estimator's hidden layer.
        steps: Training steps.
        batch: Examples in a step.
        seeds: Runs of each arm.
        validation: Training examples held out.
        threads: CPU threads; 1 where the work of a step is too small to share.
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


_SMALL = Tuned(1e-3, 1e-3, 0)
_DEEP = Tuned(1e-4, 5e-4, 1)
"""In place of a preset's ``other`` on networks of more than ten layers; chosen on 21 layers and MNIST."""
_UNLOCKED = Tuned(3e-4, 3e-3, 1)
"""In place of it where every partition runs on synthetic inputs; chosen on 4 layers and MNIST."""

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
        ("cnn", "cifar10"): Preset(3, 128, Tuned(3e-4, 3e-3, 1), Tuned(3e-4, 1e-5, 0), 128, 2000, 128, 1, 5000),
    }
)
"""By network and data: the paper's networks (smaller for the digits), and the steps and rates of a small machine."""

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
"""The paper's estimators (appendix A.1): hidden layers without a label, with one, and their units or filters."""

LONGER: Mapping[str, int] = MappingProxyType({"random_order": 4, "unlocked": 2})
"""How many times the small budget's steps a schedule gets in which most partitions rest."""


@dataclass(frozen=True)
class Settings:
    """Options with nothing left open; ``Feedforward`` says what each is.

    Attributes:
        hidden, lr, estimator_lr: For everything but synthetic gradients without context.
        plain_hidden, plain_lr, plain_estimator_lr: For those.
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

    @property
    def all_seeds(self) -> range:
        """The seeds that each arm is run from."""
        return range(self.seed, self.seed + self.seeds)


def complete(options: Feedforward) -> Settings:
    """Return the options with everything chosen that they left open.

    Where a learning rate is given and no estimators' rate, the estimators have the same.

    Raises:
        OptionError: Where a value is out of its range.
    """
    chosen = _chosen(options)
    given = vars(options)
    rates = given["lr"] if given["estimator_lr"] is None else given["estimator_lr"]
    plain = {"plain_hidden": given["hidden"], "plain_lr": given["lr"], "plain_estimator_lr": rates}
    asked = {**given, **plain, "estimator_lr": rates}
    names = [one.name for one in fields(Settings)]
    values: dict[str, Any] = {name: chosen.get(name) if asked.get(name) is None else asked[name] for name in names}
    settings = Settings(**values)
    _check(settings)
    return settings


def _chosen(options: Feedforward) -> dict[str, Any]:
    preset = _preset(options)
    steps = options.steps or preset.steps * (LONGER.get(options.schedule, 1) if options.budget == "small" else 1)
    rarest = min((p for p in options.p if p > 0), default=1.0)
    both = {f"plain_{name}": (value,) for name, value in asdict(preset.plain).items()}
    both |= {name: (value,) for name, value in asdict(preset.other).items()}
    return {
        **asdict(preset),
        **both,
        "layers": (preset.layers,),
        "steps": steps,
        "lr_drops": (0.6, 0.8),
        # So that the last partition computes its loss in every stretch but one of 10^8.
        "evaluate_every": min(steps, max(1, steps // 20, math.ceil(20 / rarest) if options.p else 1)),
        "diagnose_every": max(10, steps // 200),
    }


def _deep(preset: Preset) -> Preset:
    """Return a preset for more than ten layers: estimators as wide as these, and twice the steps."""
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
        estimator_width=width,
        steps=500_000,
        batch=256,
    )


_LEAST = {"layers": 2, "batch": 2, "hidden": 0, "diagnose_every": 0, "probe_every": 0, "threads": 0}
_COUNTS = (
    "layers",
    "position",
    "width",
    "hidden",
    "estimator_width",
    "steps",
    "batch",
    "seeds",
    "validation",
    "evaluate_every",
    "diagnose_every",
    "probe_every",
    "threads",
)


def _check(settings: Settings) -> None:
    for name in _COUNTS:
        value, minimum = getattr(settings, name), _LEAST.get(name, 1)
        least = min(value, default=minimum) if isinstance(value, tuple) else value
        if least < minimum:
            raise OptionError(f"--{name.replace('_', '-')}: got {least}, expected {minimum} or more")
    for name in ("layers", "gradient", "context", "hidden", "decay", "lr", "estimator_lr"):
        if not getattr(settings, name):
            raise OptionError(
                f"--{name.replace('_', '-')}: got no value, expected one or more; leave it out for the default"
            )
    _check_rates(settings)
    _check_arms(settings)


def _check_rates(settings: Settings) -> None:
    for flag, rates in (("--lr", settings.lr), ("--estimator-lr", settings.estimator_lr)):
        if min(rates) <= 0:
            raise OptionError(f"{flag}: got {min(rates)}, expected a rate above 0, as 1e-3")
    for drop in settings.lr_drops:
        if not 0 < drop < 1:
            raise OptionError(f"--lr-drops: got {drop}, expected shares of the steps between 0 and 1, as 0.6,0.8")


def _check_arms(settings: Settings) -> None:
    deepest = min(settings.layers) - 1
    if settings.position and max(settings.position) > deepest:
        raise OptionError(
            f"--position: got {max(settings.position)}, but a network of {min(settings.layers)} layers has {deepest} "
            f"hidden ones; give 1..{deepest}"
        )
    if bool(settings.p) != (settings.schedule != "sequential"):
        raise OptionError(
            f"--p: got {settings.p or 'no value'} for --schedule {settings.schedule}; random_order and unlocked need update "
            "probabilities, as 0.2, sequential takes none"
        )
    if settings.schedule != "sequential" and settings.target == "fused":
        raise OptionError(f"--target: fused has no schedule, got --schedule {settings.schedule}; leave --target out")
