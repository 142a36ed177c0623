"""The options of the feed-forward recipes, and what the recipe chooses where they leave it open."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dnifx.errors import OptionError
from dnifx.zoo.recipes.base import option

DATA = ("digits", "mnist", "fashion", "cifar10")
GRADIENTS = ("backprop", "zero", "stale", "synthetic", "oracle")


@dataclass(frozen=True)
class Feedforward:
    """Options of the recipes ``fcn`` and ``cnn``; None is chosen by the data set and the network."""

    net: str = option("fcn", "network", ("fcn", "cnn"))
    data: str = option("digits", "data set", DATA)
    layers: int | None = option(None, "layers of the network, the classifier among them")
    width: int | None = option(None, "units (or filters) of a hidden layer")
    gradient: tuple[str, ...] = option(
        ("backprop", "zero", "synthetic"), "what the hidden layers learn from, one or more", GRADIENTS
    )
    context: tuple[str, ...] = option(
        ("none", "label"), "what synthetic gradients see beside the activation: one arm for each", ("none", "label")
    )
    hidden: int | None = option(None, "hidden layers of an estimator; 0 is an affine map")
    estimator_width: int | None = option(None, "units (or filters) of an estimator's hidden layer")
    steps: int | None = option(None, "training steps")
    batch: int | None = option(None, "examples in a step")
    lr: float | None = option(None, "learning rate of Adam, for the network and the estimators")
    lr_drops: tuple[float, ...] | None = option(None, "shares of the steps after which the rate is cut by 10: 0.6,0.8")
    seeds: int | None = option(None, "runs of each arm, over which mean and spread are taken")
    seed: int = option(0, "the first seed; the others follow it")
    validation: int | None = option(None, "training examples held out for the validation error")
    evaluate_every: int | None = option(None, "steps from one validation (and checkpoint) to the next")
    target: str = option(
        "scheduled", "what is compiled: one fused module, or a scheduled trainer", ("fused", "scheduled")
    )
    device: str = option("cpu", "where to train: cpu, cuda, cuda:1")
    threads: int | None = option(None, "CPU threads of torch; 0 leaves their number as it is")
    out: Path | None = option(None, "folder for results, curves and the checkpoints to resume from")  # noqa: RUF009


@dataclass(frozen=True)
class Preset:
    """What the recipe chooses for one network on one data set.

    Attributes:
        layers: Layers, the classifier among them.
        width: Units (or filters) of a hidden layer.
        hidden: Hidden layers of an estimator without context.
        hidden_label: Hidden layers of an estimator that sees the label.
        estimator_width: Units (or filters) of an estimator's hidden layer.
        steps: Training steps.
        batch: Examples in a step.
        lr: Learning rate.
        seeds: Runs of each arm.
        validation: Training examples held out.
        threads: CPU threads; 1 where the work of a step is too small to share.
    """

    layers: int
    width: int
    hidden: int
    hidden_label: int
    estimator_width: int
    steps: int
    batch: int
    lr: float
    seeds: int
    validation: int
    threads: int = 0


_MNIST_FCN = Preset(4, 256, 2, 0, 1024, 6000, 256, 1e-3, 1, 5000)
_MNIST_CNN = Preset(3, 64, 2, 0, 64, 2000, 128, 1e-3, 1, 5000)

PRESETS: Mapping[tuple[str, str], Preset] = MappingProxyType(
    {
        ("fcn", "digits"): Preset(4, 128, 1, 0, 256, 1500, 64, 3e-4, 3, 180, threads=1),
        ("fcn", "mnist"): _MNIST_FCN,
        ("fcn", "fashion"): _MNIST_FCN,
        ("fcn", "cifar10"): Preset(5, 1000, 1, 1, 4000, 2000, 256, 1e-3, 1, 5000),
        ("cnn", "digits"): Preset(3, 16, 1, 0, 32, 1000, 64, 1e-3, 3, 180, threads=1),
        ("cnn", "mnist"): _MNIST_CNN,
        ("cnn", "fashion"): _MNIST_CNN,
        ("cnn", "cifar10"): Preset(3, 128, 2, 0, 128, 2000, 128, 1e-3, 1, 5000),
    }
)
"""By network and data: the sizes of the paper (appendix A.1; smaller for the digits), and a small machine's steps."""


@dataclass(frozen=True)
class Settings:
    """Options with nothing left open; ``Feedforward`` says what each is.

    Attributes:
        hidden: Hidden layers of an estimator without context.
        hidden_label: Hidden layers of an estimator that sees the label.
    """

    net: str
    data: str
    layers: int
    width: int
    gradient: tuple[str, ...]
    context: tuple[str, ...]
    hidden: int
    hidden_label: int
    estimator_width: int
    steps: int
    batch: int
    lr: float
    lr_drops: tuple[float, ...]
    seeds: int
    seed: int
    validation: int
    evaluate_every: int
    target: str
    device: str
    threads: int
    out: Path | None

    @property
    def all_seeds(self) -> range:
        """The seeds that each arm is run from."""
        return range(self.seed, self.seed + self.seeds)


def complete(options: Feedforward) -> Settings:
    """Return the options with everything chosen that they left open.

    Raises:
        OptionError: Where a value is out of its range.
    """
    given = {**vars(options), "hidden_label": options.hidden}
    chosen: dict[str, Any] = {**asdict(PRESETS[options.net, options.data]), "lr_drops": (0.6, 0.8)}
    chosen["evaluate_every"] = max(1, (options.steps or chosen["steps"]) // 20)
    values: dict[str, Any] = {name: chosen.get(name) if value is None else value for name, value in given.items()}
    settings = Settings(**values)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    least = {"layers": 2, "batch": 2, "hidden": 0, "threads": 0}
    for name in (
        "layers",
        "width",
        "hidden",
        "estimator_width",
        "steps",
        "batch",
        "seeds",
        "validation",
        "evaluate_every",
        "threads",
    ):
        value, minimum = getattr(settings, name), least.get(name, 1)
        if value < minimum:
            raise OptionError(f"--{name.replace('_', '-')}: got {value}, expected {minimum} or more")
    if settings.lr <= 0:
        raise OptionError(f"--lr: got {settings.lr}, expected a rate above 0, as 1e-3")
    if not settings.gradient or not settings.context:
        raise OptionError(
            "--gradient, --context: got no value, expected one or more; leave them out for the default arms"
        )
    for drop in settings.lr_drops:
        if not 0 < drop < 1:
            raise OptionError(f"--lr-drops: got {drop}, expected shares of the steps between 0 and 1, as 0.6,0.8")
