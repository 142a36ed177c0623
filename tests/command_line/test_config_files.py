"""Config files: what a run writes repeats it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dnifx.errors import OptionError
from dnifx.recipe_commands import recipe_command
from dnifx.zoo.recipes import RECIPES, Recipe, option
from dnifx.zoo.recipes.config import FILE, config_text, read_config


@dataclass(frozen=True)
class Some:
    """Options of every kind."""

    steps: int = option(10, "how many")
    rate: float | None = option(None, "how fast")
    names: tuple[str, ...] = option(("a",), "which")
    depths: tuple[int, ...] = option((1, 2), "how deep")
    loud: bool = option(False, "whether it prints")
    text: str = option("t", "a text")
    out: Path | None = option(None, "a folder")  # noqa: RUF009


SOME = Recipe("some", "for a test", Some, lambda options, console: None)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=","), min_size=1).map(str.strip)
CHOICES = st.builds(
    Some,
    steps=st.integers(-(2**60), 2**60),
    rate=st.none() | st.floats(allow_nan=False),
    names=st.lists(WORDS.filter(lambda word: word not in ("", "none")), max_size=3).map(tuple),
    depths=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    loud=st.booleans(),
    text=st.text(st.characters(exclude_categories=["Cs"])),
)


@given(CHOICES)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, options: Some) -> None:
    path = tmp_path_factory.getbasetemp() / "options.toml"
    path.write_text(config_text(SOME, options), encoding="utf-8")
    assert SOME.read(read_config(SOME, path)) == options


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipes_defaults_are_written_and_read(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    path = tmp_path / FILE
    path.write_text(config_text(recipe, recipe.read({})), encoding="utf-8")
    assert recipe.read(read_config(recipe, path)) == recipe.read({})


def test_a_run_leaves_the_file_that_repeats_it(tmp_path: Path) -> None:
    seen: list[Some] = []

    def take(options: Some, console: Console) -> None:
        seen.append(options)

    command = recipe_command(Recipe("some", "for a test", Some, take))
    first, second = tmp_path / "first", tmp_path / "second"
    command(steps=3, names=["b", "c"], text='say "no"', out=first)
    command(config=first / FILE, out=second)
    command(config=first / FILE, steps=4)
    assert seen[0] == Some(steps=3, names=("b", "c"), text='say "no"', out=first)
    assert seen[1] == Some(steps=3, names=("b", "c"), text='say "no"', out=second)
    assert seen[2] == Some(steps=4, names=("b", "c"), text='say "no"')
    assert (first / FILE).read_text() == (second / FILE).read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "this is no TOML"),
        ("stps = 3", "no option 'stps'; did you mean 'steps'"),
        ("recipe = 'fcn'", "is for the recipe 'fcn'; run dnifx train fcn"),
        ("[steps]\nmany = 3", "steps is a table"),
        ("steps = 'many'", "expected int"),
        ("steps = 1.5", "expected int"),
        ("loud = 1", "expected bool"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        SOME.read(read_config(SOME, path))
    with pytest.raises(OptionError, match="cannot be read"):
        read_config(SOME, tmp_path / "none.toml")
