"""Recipes: their options as text, and what their runs leave behind."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnifx.errors import DnifxError, OptionError, StateError
from dnifx.zoo.recipes import RECIPES, Recipe, option, options_of
from dnifx.zoo.recipes.feedforward import run
from dnifx.zoo.recipes.settings import PRESETS, Feedforward, complete
from dnifx.zoo.recipes.store import Checkpoint
from dnifx.zoo.recipes.variants import Variant, variants

FCN = RECIPES["fcn"]
BRIEF: Mapping[str, Any] = {"width": 8, "steps": 6, "batch": 16, "seeds": 1, "evaluate_every": 2, "estimator_width": 8}


def parsed(command: str) -> Mapping[str, Any]:
    """Return the option values of a command line of --flag value pairs."""
    words = shlex.split(command)[3:]
    return {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


def test_options_know_their_types() -> None:
    known = {one.name: one for one in FCN.parameters}
    assert "net" not in known
    assert (known["lr"].kind, known["lr"].flag) == (float, "--lr")
    assert (known["lr_drops"].kind, known["lr_drops"].many, known["lr_drops"].flag) == (float, True, "--lr-drops")
    assert (known["out"].kind, known["out"].default) == (Path, None)
    assert known["gradient"].choices[0] == "backprop"
    assert all(one.help for one in FCN.parameters)


@given(
    layers=st.none() | st.lists(st.integers(2, 21), min_size=1, max_size=3).map(tuple),
    lr=st.none() | st.lists(st.floats(1e-6, 1), min_size=1, max_size=2).map(tuple),
    drops=st.none() | st.lists(st.floats(0.1, 0.9), max_size=3).map(tuple),
    gradient=st.lists(st.sampled_from(["backprop", "zero", "synthetic"]), min_size=1, unique=True).map(tuple),
    context=st.sampled_from([("none",), ("label",), ("none", "label")]),
    out=st.none() | st.sampled_from(["runs/a", "a folder"]).map(Path),
)
def test_the_command_reads_back_as_its_options(**values: Any) -> None:
    values["lr_drops"] = values.pop("drops")
    options = Feedforward(experiment="fcn", **values)
    assert FCN.read(parsed(FCN.command(options))) == options


def test_many_values_are_repeated_or_joined_by_commas() -> None:
    assert FCN.read({"gradient": "zero,synthetic"}) == FCN.read({"gradient": ["zero", "synthetic"]})
    assert FCN.read({"gradient": ("zero", "synthetic,stale")}).gradient == ("zero", "synthetic", "stale")
    assert FCN.read({"lr_drops": "none"}).lr_drops == ()
    assert FCN.read({"context": "none"}).context == ("none",)
    assert FCN.read({"layers": "3..6"}).layers == (3, 4, 5, 6)
    assert FCN.read({"layers": "3,5..6"}).layers == (3, 5, 6)
    assert FCN.read({"steps": None}) == Feedforward(experiment="fcn")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"stepz": 3}, "recipe fcn: no option 'stepz'; did you mean .*'steps'"),
        ({"steps": "many"}, "--steps: got 'many', expected int"),
        ({"data": "minst"}, "--data: got 'minst', expected one of digits, mnist, .*; did you mean 'mnist'"),
        ({"gradient": "zero,sinthetic"}, "--gradient: got 'sinthetic'.*did you mean 'synthetic'"),
    ],
)
def test_bad_values_say_what_is_expected(values: Mapping[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        FCN.read(values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"steps": 0}, "--steps: got 0, expected 1 or more"),
        ({"layers": (1,)}, "--layers: got 1, expected 2 or more"),
        ({"lr": (0.0,)}, "--lr: got 0.0, expected a rate above 0"),
        ({"lr_drops": (0.6, 60.0)}, "--lr-drops: got 60.0, expected shares"),
        ({"gradient": ()}, "--gradient: got no value"),
        ({"lr": (1e-3, 0.0)}, "--lr: got 0.0"),
        ({"position": (4,)}, r"--position: got 4, but a network of 4 layers has 3 hidden layers; give 1\.\.3"),
        ({"p": (0.5,)}, "--p: got .* for --schedule sequential"),
        ({"schedule": "random_order"}, "--p: got no value for --schedule random_order"),
        ({"schedule": "unlocked", "p": (0.5,), "target": "fused"}, "--target: fused has no schedule"),
        ({"step": "graph"}, "--step: graph is for GPUs, got --device cpu"),
        ({"device": "abacus"}, "--device: got 'abacus', expected cpu"),
        ({"device": "cuda:99"}, "--device: got 'cuda:99', but torch sees"),
        ({"validation": 5000}, "validation=5000, expected fewer than the 1437"),
    ],
)
def test_senseless_options_are_refused(values: Mapping[str, Any], text: str) -> None:
    with pytest.raises(DnifxError, match=text):
        run(Feedforward(**{**BRIEF, "gradient": ("backprop",), **values}))


def test_a_field_that_no_command_line_can_say_is_refused() -> None:
    @dataclass(frozen=True)
    class Odd:
        table: Mapping[str, int] = option(None, "a table")

    with pytest.raises(OptionError, match="option 'table' of type"):
        options_of(Odd)


def test_booleans_are_flags() -> None:
    @dataclass(frozen=True)
    class Switches:
        fast: bool = option(False, "be fast")

    recipe = Recipe("switch", "a switch", Switches, lambda options, console: None)
    assert recipe.command(Switches(fast=True)) == "dnifx train switch --fast"
    assert recipe.read({"fast": True}).fast is True
    assert recipe.read({"fast": "false"}).fast is False
    with pytest.raises(OptionError, match="--fast: got 'maybe', expected bool"):
        recipe.read({"fast": "maybe"})


def test_variants_are_the_four_of_the_paper() -> None:
    assert [variant.name for variant in variants(complete(Feedforward()))] == ["backprop", "no gradient", "DNI", "cDNI"]
    only = complete(Feedforward(gradient=("zero", "synthetic"), context=("label",)))
    assert variants(only) == (Variant("zero", layers=4), Variant("synthetic", "label", layers=4))


def test_every_preset_is_complete() -> None:
    for net, data in PRESETS:
        settings = complete(Feedforward(net=net, data=data))
        assert None not in [value for name, value in vars(settings).items() if name not in ("out", "log_dir")]
    assert complete(Feedforward(data="mnist")).plain_hidden == (2,)
    told = complete(Feedforward(data="mnist", hidden=(1,)))
    assert told.hidden == told.plain_hidden == (1,)


def test_the_paper_s_budget_is_its_own_schedule() -> None:
    settings = complete(Feedforward(data="mnist", budget="paper"))
    assert (settings.steps, settings.batch, settings.lr, settings.lr_drops) == (500_000, 256, (3e-5,), (0.6, 0.8))
    assert (settings.plain_hidden, settings.hidden, settings.estimator_width) == ((2,), (0,), 1024)
    assert settings.plain_estimator_lr == settings.estimator_lr == (3e-5,)
    assert complete(Feedforward(data="cifar10", budget="paper", steps=9)).steps == 9


def test_estimators_take_the_network_s_rate_where_no_other_is_given() -> None:
    settings = complete(Feedforward(data="mnist", lr=(1e-2,)))
    assert (settings.estimator_lr, settings.plain_estimator_lr, settings.plain_lr) == ((1e-2,), (1e-2,), (1e-2,))
    assert complete(Feedforward(estimator_lr=(1e-1,))).plain_estimator_lr == (1e-1,)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Checkpoint(path, {"lr": 1e-3, "steps": 5}).save({"step": 2})
    assert Checkpoint(path, {"lr": 1e-3, "steps": 5}).load() == {"step": 2}
    with pytest.raises(StateError, match=r"other settings \(lr: 0.001, now 0.01\); give the same"):
        Checkpoint(path, {"lr": 1e-2, "steps": 5}).load()
    path.write_bytes(b"damaged")
    with pytest.raises(StateError, match=r"run\.pt cannot be read as a checkpoint"):
        Checkpoint(path, {}).load()
    assert Checkpoint(tmp_path / "absent.pt", {}).load() is None


def test_results_are_written_whole_and_read_as_json(tmp_path: Path) -> None:
    results = run(Feedforward(**BRIEF, gradient=("backprop",), out=tmp_path))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["command"] == results.command
    assert FCN.read(parsed(saved["command"])) == Feedforward(
        experiment="fcn", **BRIEF, gradient=("backprop",), out=tmp_path
    )
    assert saved["variants"][0]["test_error"]["mean"] == results.variants[0].mean
    assert [point["step"] for point in saved["variants"][0]["runs"][0]["curve"]] == [2, 4, 6]
    assert saved["versions"].keys() == {"dnifx", "torch", "python", "system"}
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "curves.png", "results.json"]
