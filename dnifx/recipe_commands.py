"""The commands of ``dnifx train``: one for each recipe, with the recipe's own options."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dnifx.zoo.recipes import RECIPES, Option, Recipe
from dnifx.zoo.recipes.config import keep_config, merged

STYLE: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Read options from this TOML file, such as the config.toml that a run leaves in --out."
    ),
]


def recipe_app() -> typer.Typer:
    """Return a command line with one command for each recipe. Its options are those of the recipe."""
    recipes = typer.Typer(**STYLE)
    recipes.callback()(_recipes)
    for recipe in RECIPES.values():
        example = f"Example: dnifx train {recipe.name} --out runs/{recipe.name}"
        recipes.command(recipe.name, help=recipe.summary, epilog=example)(recipe_command(recipe))
    return recipes


def _recipes() -> None:
    """Train a recipe of the zoo."""


def recipe_command(recipe: Recipe[Any]) -> Callable[..., None]:
    """Return a function that runs a recipe. Its signature tells typer the recipe's options."""

    def command(config: Path | None = None, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None}
        options = recipe.read(merged(recipe, config, given))
        keep_config(recipe, options)
        recipe.run(options, Console())

    parameters = [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config),
        *_parameters(recipe),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(recipe: Recipe[Any]) -> list[inspect.Parameter]:
    """Return the options of a recipe as typer reads them."""
    return [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(option))
        for option in recipe.parameters
    ]


def _annotation(option: Option) -> Any:
    """Describe one option to typer. The option itself reads the values, so that errors are the same everywhere."""
    kind: Any = option.kind if option.kind in (bool, int, float, Path) and not option.many else str
    flag = f"{option.flag}/--no-{option.flag[2:]}" if kind is bool else option.flag
    words = f"[{'|'.join(option.choices)}]" if option.choices else None
    return Annotated[kind | None, typer.Option(flag, help=_option_help(option), metavar=words)]


def _option_help(option: Option) -> str:
    """Return what an option is, and its default."""
    if option.default is None:
        return option.help
    default = ",".join(map(str, option.default)) if option.many else str(option.default)
    return f"{option.help} (default: {default or 'none'})"
