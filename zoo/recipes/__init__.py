"""Experiments, each run by one command, ``dnifx train NAME``, or by its recipe's ``run``."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dnifx.zoo.recipes.base import Option, Recipe, option, options_of
from dnifx.zoo.recipes.delayed_cue import DELAYED_CUE
from dnifx.zoo.recipes.feedforward import FEEDFORWARD
from dnifx.zoo.recipes.sequences import RECIPE_OF as SEQUENCES
from dnifx.zoo.recipes.two_clocks import TWO_CLOCKS

RECIPES: Mapping[str, Recipe[Any]] = MappingProxyType(
    {**FEEDFORWARD, **SEQUENCES, DELAYED_CUE.name: DELAYED_CUE, TWO_CLOCKS.name: TWO_CLOCKS}
)
"""Every recipe by its name."""

__all__ = ["RECIPES", "Option", "Recipe", "option", "options_of"]
