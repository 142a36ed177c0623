"""Train the paper's feed-forward networks by backprop, with no gradient, and by synthetic gradients, side by side."""

from rich.console import Console

from dnifx.zoo.recipes.base import Recipe
from dnifx.zoo.recipes.settings import Feedforward


def run(options: Feedforward, console: Console | None = None) -> object:
    """Train every arm."""
    raise NotImplementedError


FCN_RECIPE = Recipe(
    "fcn", "the fully connected network: backprop, no gradient, DNI and cDNI", Feedforward, run, {"net": "fcn"}
)
CNN_RECIPE = Recipe(
    "cnn", "the convolutional network: backprop, no gradient, DNI and cDNI", Feedforward, run, {"net": "cnn"}
)
