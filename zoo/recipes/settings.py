"""The options of the feed-forward recipes, and what the recipe chooses where they leave it open."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType

from dnifx.errors import OptionError
from dnifx.zoo.recipes.base import option

DATA = ("digits", "mnist", "fashion", "cifar10")
GRADIENTS = ("backprop", "zero", "stale", "synthetic", "oracle")


@dataclass(frozen=True)
class Feedforward:
    """Options of the recipes ``fcn`` and ``cnn``; None is chosen by the data set and the network."""

    net: str = option("fcn", "network", ("fcn", "cnn"))
    data: str = option("digits", "data set", DATA)
    layers: int = option(
        4, "layers of the network, the classifier among them; an interface stands after every hidden one"
    )
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
    out: Path | None = option(None, "folder for results, curves and the checkpoints to resume from")  # noqa: RUF009


@dataclass(frozen=True)
class Preset:
    """What the recipe chooses for one network on one data set.

    Attributes:
        width: Units (or filters) of a hidden layer.
        hidden: Hidden layers of an estimator without context.
        hidden_label: Hidden layers of an estimator that sees the label.
        estimator_width: Units (or filters) of an estimator's hidden layer.
        steps: Training steps.
        batch: Examples in a step.
        lr: Learning rate.
        seeds: Runs of each arm.
        validation: Training examples held out.
    """

    width: int
    hidden: int
    hidden_label: int
    estimator_width: int
    steps: int
    batch: int
    lr: float
    seeds: int
    validation: int


_MNIST_FCN = Preset(256, 2, 0, 1024, 6000, 256, 1e-3, 1, 5000)
_MNIST_CNN = Preset(64, 2, 0, 64, 2000, 128, 1e-3, 1, 5000)

PRESETS: Mapping[tuple[str, str], Preset] = MappingProxyType(
    {
        ("fcn", "digits"): Preset(256, 1, 0, 256, 800, 64, 1e-3, 3, 180),
        ("fcn", "mnist"): _MNIST_FCN,
        ("fcn", "fashion"): _MNIST_FCN,
        ("fcn", "cifar10"): Preset(1000, 1, 1, 4000, 2000, 256, 1e-3, 1, 5000),
        ("cnn", "digits"): Preset(16, 1, 0, 16, 400, 64, 1e-3, 3, 180),
        ("cnn", "mnist"): _MNIST_CNN,
        ("cnn", "fashion"): _MNIST_CNN,
        ("cnn", "cifar10"): Preset(128, 2, 0, 128, 2000, 128, 1e-3, 1, 5000),
    }
)
"""By network and data: the sizes of the paper (appendix A.1; smaller for the digits), and a small machine's steps."""


def complete(options: Feedforward) -> Feedforward:
    """Return the options with everything chosen that they left open (``hidden`` stays open: it depends on the context).

    Raises:
        OptionError: Where a number is out of its range.
    """
    preset = PRESETS[options.net, options.data]
    chosen = {
        one.name: getattr(preset, one.name)
        for one in fields(Preset)
        if one.name not in ("hidden", "hidden_label") and getattr(options, one.name) is None
    }
    options = replace(options, **chosen)
    if options.lr_drops is None:
        options = replace(options, lr_drops=(0.6, 0.8))
    if options.evaluate_every is None:
        options = replace(options, evaluate_every=max(1, (options.steps or 1) // 20))
    _check(options)
    return options


def hidden_layers(options: Feedforward, context: str) -> int:
    """Return how many hidden layers an estimator with that context gets."""
    preset = PRESETS[options.net, options.data]
    if options.hidden is not None:
        return options.hidden
    return preset.hidden_label if context == "label" else preset.hidden


def _check(options: Feedforward) -> None:
    least = {
        "layers": 2,
        "width": 1,
        "steps": 1,
        "batch": 2,
        "seeds": 1,
        "validation": 1,
        "evaluate_every": 1,
        "hidden": 0,
    }
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise OptionError(f"--{name.replace('_', '-')}: got {value}, expected {minimum} or more")
    if not options.gradient or not options.context:
        raise OptionError(
            "--gradient and --context: got no value, expected one or more; leave them out for the default arms"
        )
    for drop in options.lr_drops or ():
        if not 0 < drop < 1:
            raise OptionError(f"--lr-drops: got {drop}, expected shares of the steps between 0 and 1, as 0.6,0.8")
