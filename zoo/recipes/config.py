"""Config files: the options of a recipe as TOML, read before a run and written by it."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnifx.errors import OptionError, nearest
from dnifx.zoo.recipes.base import Recipe
from dnifx.zoo.recipes.outputs import prepare, write_whole

FILE = "config.toml"
"""The file in a run's output folder that repeats the run."""

RECIPE = "recipe"
"""The key that names the recipe."""


def read_config(recipe: Recipe[Any], path: Path) -> dict[str, Any]:
    """Return the options in a config file, by field name.

    Raises:
        OptionError: The file cannot be read, is for another recipe, or holds what is no option of this one.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"--config {path}: cannot be read: {error.strerror}; name a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path}: this is no TOML: {error}; write lines like steps = 1000") from error
    named = found.pop(RECIPE, recipe.name)
    if named != recipe.name:
        raise OptionError(f"--config {path} is for the recipe {named!r}; run dnifx train {named} --config {path}")
    known = {one.name: one for one in recipe.parameters}
    options = {key.replace("-", "_"): value for key, value in found.items()}
    for key, value in options.items():
        if key not in known:
            raise OptionError(f"--config {path}: no option {key!r}; did you mean {nearest(key, known, 1)}?")
        if isinstance(value, dict):
            raise OptionError(f"--config {path}: {key} is a table; give a value or a list, as in {key} = 3")
    return options


def config_text(recipe: Recipe[Any], options: Any) -> str:
    """Return the config file that repeats a run, in another output folder."""
    lines = [f"# dnifx train {recipe.name} --config {FILE} --out FOLDER", f"{RECIPE} = {_toml(recipe.name)}"]
    for one in recipe.parameters:
        value = getattr(options, one.name)
        if value is not None and one.name not in ("out", "log_dir"):
            lines.append(f"{one.name} = {_toml(value)}")
    return "\n".join([*lines, ""])


def keep_config(recipe: Recipe[Any], options: Any) -> None:
    """Write the config file into the run's output folder, if it has one.

    Raises:
        OptionError: The folder cannot be written to.
    """
    out: Path | None = getattr(options, "out", None)
    if out is not None:
        prepare(out)
        text = config_text(recipe, options)
        write_whole(out / FILE, lambda part: part.write_text(text, encoding="utf-8"))


def merged(recipe: Recipe[Any], config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config file, and over them those that were given themselves."""
    return {**(read_config(recipe, config) if config is not None else {}), **given}


def _toml(value: Any) -> str:
    """Write a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return (
        repr(value)
        if isinstance(value, int | float)
        else json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    )
