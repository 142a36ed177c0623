"""The options of the recipe ``table``, and what a model chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dnifx.errors import OptionError
from dnifx.zoo.recipes.base import BOARD, option
from dnifx.zoo.recipes.checks import check_given, check_least, check_rates

NAMES = {
    "backprop": "backprop",
    "heads": "backprop, same heads",
    "zero": "nothing",
    "linear": "linear head",
    "synthetic": "synthetic, label",
    "suffix": "suffix",
    "shared": "suffix, shared readout",
    "mirrors": "suffix, mirrors",
    "late": "late gradient",
}
"""The names in tables of the words that ``--variants`` takes."""

MODELS = ("resnet", "vit", "lm", "fcn", "cnn")
IMAGES = ("digits", "mnist", "fashion", "cifar10")

_CHOSEN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "resnet": {"layers": 3, "width": 16, "batch": 64},
        "vit": {"layers": 6, "width": 64, "batch": 64},
        "lm": {"layers": 4, "width": 64, "batch": 32},
        "fcn": {"layers": 4, "width": 256, "batch": 256},
        "cnn": {"layers": 3, "width": 64, "batch": 256},
    }
)
"""What each model chooses where an option is None."""


@dataclass(frozen=True)
class Table:
    """Options of the recipe ``table``. The model chooses what is None."""

    model: str = option("resnet", "Model to train. lm is a causal language model.", MODELS)
    cuts: tuple[str, ...] | None = option(None, "Where to cut: module paths and globs.")
    variants: tuple[str, ...] = option(
        tuple(NAMES), "What the partitions before a cut learn from. All share weights and batches at first.", NAMES
    )
    data: str | None = option(
        None,
        "Images: digits, mnist, fashion, cifar10. Text: shakespeare, excerpt. By default the small one.",
        (*IMAGES, "shakespeare", "excerpt"),
    )
    text: Path | None = option(None, "A text file to read by words, for --model lm.")  # noqa: RUF009
    vocabulary: int = option(2000, "Words at most, with --text.")
    layers: int | None = option(None, "Blocks, layers with the classifier, or residual blocks of a stage.")
    width: int | None = option(None, "Units, filters or features.")
    attention: int = option(4, "Heads of an attention.")
    length: int = option(64, "Symbols of a window.")
    tied: bool = option(False, "Whether the language model's readout is its embedding.")
    blocks: int = option(1, "Blocks that a suffix keeps.")
    refresh: int = option(50, "Steps after which mirrors are taken again.")
    decay: float | None = option(None, "With mirrors: make the kept blocks averages of the model's, with this decay.")
    late: int = option(4, "Steps by which the late gradient of each cut is late.")
    batch: int | None = option(None, "Examples or windows in a step.")
    steps: int = option(600, "Training steps of a run.")
    lr: tuple[float, ...] = option((1e-3,), "Learning rate of Adam. Validation chooses among several.")
    head_lr: tuple[float, ...] = option(
        (), "Learning rate of heads and estimators, by default the network's. Validation chooses among several."
    )
    warm_up: float = option(0.1, "Share of the steps in which the rates grow. They then fall along a cosine.")
    seeds: int = option(1, "Runs of each variant.")
    seed: int = option(0, "The first seed. The other runs count up from it.")
    evaluate_every: int = option(100, "Measure and save a checkpoint every so many steps.")
    threads: int = option(0, "CPU threads of torch; 0 keeps the present number.")
    matmul: str = option(
        "highest", "Precision of float32 matrix products; medium is faster on a CPU.", ("highest", "high", "medium")
    )
    out: Path | None = option(  # noqa: RUF009
        None, "Folder for results, curves and checkpoints. The same command resumes there."
    )
    log_dir: Path | None = option(None, BOARD)  # noqa: RUF009


def cuts_of(model: str, layers: int) -> tuple[str, ...]:
    """Return a model's default cuts: between stages, at each third, in the middle, or after each hidden layer.

    >>> cuts_of("vit", 6), cuts_of("lm", 4)
    (('blocks.1', 'blocks.3'), ('blocks.1',))
    """
    match model:
        case "resnet":
            return "stages.0", "stages.1"
        case "vit" | "lm":
            parts = 3 if model == "vit" else 2
            return tuple(f"blocks.{max(layers * part // parts, 1) - 1}" for part in range(1, parts))
        case _:
            return ("hidden.*",)


def complete(options: Table) -> Table:
    """Return options in which the model has chosen what was None.

    Raises:
        OptionError: A value is out of its range, or does not fit the model.
    """
    chosen = {name: value for name, value in _CHOSEN[options.model].items() if getattr(options, name) is None}
    if options.cuts is None:
        chosen["cuts"] = cuts_of(options.model, options.layers or chosen["layers"])
    is_text = options.model == "lm"
    data = options.data or ("excerpt" if is_text else "digits")
    settings = replace(options, **chosen, data=data)
    counts = ("layers", "width", "attention", "length", "refresh", "late", "batch", "steps", "seeds", "evaluate_every")
    check_least(settings, {**dict.fromkeys(counts, 1), "blocks": 0, "vocabulary": 2})
    check_given(settings, ("cuts", "variants", "lr"))
    check_rates(settings, ("lr", "head_lr"))
    if is_text == (data in IMAGES):
        fitting = "shakespeare, excerpt, or --text FILE" if is_text else ", ".join(IMAGES)
        raise OptionError(f"--data: got {data}, but --model {options.model} reads other data; give {fitting}")
    if options.text is not None and not is_text:
        raise OptionError(f"--text is read by --model lm alone, and the model is {options.model}; leave it out")
    if not 0 <= options.warm_up < 1:
        raise OptionError(f"--warm-up: got {options.warm_up}, expected a share of the steps from 0 up to 1")
    return settings
