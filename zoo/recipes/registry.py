"""Every recipe: its name, summary and options. A recipe imports torch when it runs, so that help texts need no torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from rich.console import Console

from dnifx.zoo.recipes.base import Recipe
from dnifx.zoo.recipes.sequence_options import Cue, Sequences
from dnifx.zoo.recipes.settings import GRADIENTS, Feedforward
from dnifx.zoo.recipes.table_options import Table
from dnifx.zoo.recipes.two_clocks_options import Clocks


def _run_of(module: str) -> Callable[[Any, Console], object]:
    """Return the function ``run`` of a module of this package, which is imported when the function is called."""

    def run(options: Any, console: Console | None = None) -> object:
        return import_module(f"dnifx.zoo.recipes.{module}").run(options, console)

    return run


def _feedforward(
    name: str, summary: str, fixed: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> Recipe[Feedforward]:
    return Recipe(name, summary, Feedforward, _run_of("feedforward"), {"experiment": name, **fixed}, defaults or {})


def _sequence(task: str, summary: str, **fixed: Any) -> Recipe[Sequences]:
    return Recipe(task, summary, Sequences, _run_of("sequences"), {"task": task, **fixed})


_NO_SCHEDULE = {"schedule": "sequential", "p": ()}

_ALL: tuple[Recipe[Any], ...] = (
    _feedforward("fcn", "The fully connected network: backprop, no gradient, DNI and cDNI.", {"net": "fcn"}),
    _feedforward("cnn", "The convolutional network: backprop, no gradient, DNI and cDNI.", {"net": "cnn"}),
    _feedforward(
        "table1",
        "The paper's table of test errors by depth: no gradient, backprop, DNI, cDNI.",
        {**_NO_SCHEDULE, "position": ()},
        {"data": "mnist", "layers": (3, 4, 5, 6), "gradient": ("zero", "backprop", "synthetic")},
    ),
    _feedforward(
        "single",
        "One interface at each position of a network of 6 layers, with DNI and without a gradient.",
        _NO_SCHEDULE,
        {"data": "mnist", "layers": (6,), "position": (1, 2, 3, 4, 5), "context": ("none",)},
    ),
    _feedforward(
        "sparse",
        "DNI and cDNI with 4 layers that update in random order, each with probability p.",
        {"schedule": "random_order", "target": "scheduled", "position": ()},
        {"data": "mnist", "layers": (4,), "gradient": ("synthetic",), "p": (0.05, 0.1, 0.2, 0.5, 1.0)},
    ),
    _feedforward(
        "unlock",
        "Synthetic inputs and gradients: each layer runs with probability p, forward and backward in any order.",
        {"schedule": "unlocked", "target": "scheduled", "position": ()},
        {"data": "mnist", "layers": (4,), "gradient": ("synthetic",), "hidden": (1,), "p": (0.1, 0.2, 0.5, 1.0)},
    ),
    _feedforward(
        "deep",
        "A network of 21 layers by backprop and by cDNI.",
        {**_NO_SCHEDULE, "position": ()},
        {"data": "mnist", "layers": (21,), "gradient": ("backprop", "synthetic"), "context": ("label",)},
    ),
    _feedforward(
        "stale",
        "The average of past gradients against no gradient, by depth. Validation chooses the decay.",
        {**_NO_SCHEDULE, "position": (), "context": ("none",)},
        {
            "data": "mnist",
            "layers": (3, 4, 5, 6),
            "gradient": ("zero", "stale"),
            "decay": (0.0, 0.5, 0.9, 0.99, 0.999),
        },
    ),
    _feedforward(
        "estimators",
        "Every kind of interface side by side.",
        {**_NO_SCHEDULE, "target": "scheduled"},
        {"data": "mnist", "gradient": GRADIENTS, "context": ("label",)},
    ),
    _sequence("copy", "Copy: the longest sequences solved, with and without DNI.", text=()),
    _sequence("repeat-copy", "Repeat Copy: the longest repeated sequences solved, with and without DNI.", text=()),
    _sequence("charlm", "A character model: bits per character of tiny Shakespeare, or of any text."),
    Recipe(
        "delayed-cue",
        "A cue that is asked for beyond the window: truncated BPTT against DNI and exact gradients.",
        Cue,
        _run_of("delayed_cue"),
    ),
    Recipe(
        "two-clocks",
        "Two networks that tick at different rates: joint backprop, DNI, cDNI, and no gradient between.",
        Clocks,
        _run_of("two_clocks"),
    ),
    Recipe(
        "table",
        "What partitions can learn from, side by side: a residual network, a transformer, a language model.",
        Table,
        _run_of("table"),
    ),
)

RECIPES: Mapping[str, Recipe[Any]] = MappingProxyType({recipe.name: recipe for recipe in _ALL})
"""Every recipe by its name."""
