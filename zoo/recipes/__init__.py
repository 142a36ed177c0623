"""Experiments. One command runs each: ``dnifx train NAME``, or the recipe's ``run``."""

from dnifx.zoo.recipes.base import Option, Recipe, option, options_of
from dnifx.zoo.recipes.registry import RECIPES

__all__ = ["RECIPES", "Option", "Recipe", "option", "options_of"]
