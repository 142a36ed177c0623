"""Recipes run for real: the variants learn, an interrupted run goes on bit for bit, the test set is read once."""

import copy
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils import _pytree as pytree

from dnifx.errors import LossError, StateError
from dnifx.zoo.batches import Batches
from dnifx.zoo.data import Split, load
from dnifx.zoo.recipes import feedforward
from dnifx.zoo.recipes.feedforward import run
from dnifx.zoo.recipes.learners import learner
from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.settings import Feedforward, complete
from dnifx.zoo.recipes.training import error_rate
from dnifx.zoo.recipes.variants import Variant, variants

ALL = ("backprop", "zero", "stale", "synthetic", "oracle")
BRIEF = Feedforward(
    width=8, estimator_width=8, steps=9, batch=32, seeds=1, evaluate_every=3, lr=(1e-2,), lr_drops=(0.5,), gradient=ALL
)


def brief(**values: Any) -> Feedforward:
    return replace(BRIEF, **values)


def tensors(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree)


def saved(folder: Path) -> Mapping[str, Any]:
    """Return what the checkpoints of a folder hold, but for the time that it took."""
    states = {
        path.name: torch.load(path, weights_only=True)["state"] for path in sorted(folder.glob("checkpoints/*.pt"))
    }
    for state in states.values():
        del state["seconds"]
    return states


def assert_same(ours: Any, theirs: Any) -> None:
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for mine, other in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a recipe until a variant has saved some step, then interrupts it."""

    def until(options: Feedforward, step: int) -> None:
        def point(line: Line, point: Point, unit: str = "") -> None:
            if point.step == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Line, "point", point)
            with pytest.raises(KeyboardInterrupt):
                run(options)

    return until


NETS = [("fcn", "scheduled"), ("fcn", "fused"), ("cnn", "scheduled"), ("cnn", "fused")]
LABELLED: dict[str, Any] = {"gradient": ("synthetic",), "context": ("label",)}


@pytest.mark.parametrize(("net", "target"), [NETS[0], NETS[3]])
def test_an_interrupted_run_goes_on_bit_for_bit(net: str, target: str, tmp_path: Path, interrupted: Any) -> None:
    goes_on_bit_for_bit(brief(net=net, target=target, **LABELLED), tmp_path, interrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("net", "target"), NETS)
def test_an_interrupted_run_of_all_variants_goes_on_bit_for_bit(
    net: str, target: str, tmp_path: Path, interrupted: Any
) -> None:
    goes_on_bit_for_bit(brief(net=net, target=target), tmp_path, interrupted)
    assert len(saved(tmp_path / "parts")) == 6


def goes_on_bit_for_bit(given: Feedforward, tmp_path: Path, interrupted: Any) -> None:
    """Interrupt a run once in each variant; see that it goes on as one that was not interrupted."""
    options = replace(given, layers=(3,), diagnose_every=1, probe_every=2)
    whole = run(replace(options, out=tmp_path / "whole"))
    for variant in variants(complete(options)):
        alone = replace(options, gradient=(variant.gradient,), context=(variant.context,), out=tmp_path / "parts")
        interrupted(alone, 3)
        assert not (tmp_path / "parts" / "results.json").exists()
    parts = run(replace(options, out=tmp_path / "parts"))
    assert_same(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    for ours, theirs in zip(parts.variants, whole.variants, strict=True):
        assert [one.curve for one in ours.runs] == [one.curve for one in theirs.runs]
        assert [(one.looks, one.probes) for one in ours.runs] == [(one.looks, one.probes) for one in theirs.runs]
        assert ours.mean == theirs.mean


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(brief(gradient=("backprop",), out=tmp_path))
    monkeypatch.setattr(Batches, "next", lambda batches: pytest.fail("a finished run was trained again"))
    assert run(brief(gradient=("backprop",), out=tmp_path)).variants == first.variants


@pytest.mark.parametrize("target", ["scheduled", "fused"])
def test_a_finished_run_made_longer_equals_a_run_of_that_length(target: str, tmp_path: Path) -> None:
    options = brief(gradient=("backprop", "synthetic"), context=("none",), target=target)
    longer = replace(options, steps=20, lr_drops=(0.2, 0.75), evaluate_every=4)
    run(replace(options, steps=8, lr_drops=(0.5,), evaluate_every=4, out=tmp_path / "long"))
    run(replace(longer, out=tmp_path / "long"))
    run(replace(longer, out=tmp_path / "whole"))
    assert_same(saved(tmp_path / "long"), saved(tmp_path / "whole"))


def test_a_run_whose_rates_would_have_dropped_elsewhere_is_not_made_longer(tmp_path: Path) -> None:
    options = brief(gradient=("zero",), out=tmp_path)
    run(options)
    before = saved(tmp_path)
    with pytest.raises(
        StateError, match=r"dropped after \[4\], but a run of 18 would .* after \[9\]; give --lr-drops 0\.2222"
    ):
        run(replace(options, steps=18))
    with pytest.raises(StateError, match="has made 9 steps; give at least as many"):
        run(replace(options, steps=8))
    assert_same(saved(tmp_path), before)
    run(replace(options, steps=18, lr_drops=(0.222222,)))
    assert next(iter(saved(tmp_path).values()))["step"] == 18


def test_another_seed_joins_a_finished_one(tmp_path: Path) -> None:
    first = run(brief(gradient=("synthetic",), context=("label",), out=tmp_path))
    both = run(brief(gradient=("synthetic",), context=("label",), seeds=2, out=tmp_path))
    assert both.variants[0].runs[0] == first.variants[0].runs[0]
    assert both.variants[0].runs[1].curve != first.variants[0].runs[0].curve


def test_checkpoints_of_other_options_are_refused(tmp_path: Path) -> None:
    run(brief(gradient=("backprop",), out=tmp_path))
    with pytest.raises(
        StateError,
        match=r"backprop-layers=4-lr=0.01-seed=0\.pt is the checkpoint of .* \(batch: 32, now 33\); .*another --out",
    ):
        run(brief(gradient=("backprop",), out=tmp_path, batch=33))


def test_all_variants_start_alike_and_see_the_same_batches() -> None:
    settings = complete(brief())
    weights, batches = [], []
    for variant in variants(settings):
        torch.manual_seed(4)
        trainee = learner(settings, variant, torch.zeros(32, 64))
        weights.append(copy.deepcopy(trainee.model.state_dict()))
        batches.append(Batches(load("digits").flat(), 32, seed=4).next())
    for state, batch in zip(weights, batches, strict=True):
        assert_same(dict(state), dict(weights[0]))
        assert_same(batch, batches[0])


def test_the_true_gradient_trains_as_backprop_does() -> None:
    results = run(brief(gradient=("backprop", "oracle"), steps=6))
    backprop, oracle = (variant.runs[0].curve for variant in results.variants)
    for ours, theirs in zip(oracle, backprop, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


def test_no_gradient_leaves_the_hidden_layers_as_they_were() -> None:
    torch.manual_seed(0)
    trainee = learner(complete(brief()), Variant("zero"), torch.zeros(32, 64))
    before = copy.deepcopy(dict(trainee.model.named_parameters()))
    trainee.step(torch.rand(32, 64), torch.arange(32) % 10)
    changed = {name for name, value in trainee.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("target", ["scheduled", "fused"])
@pytest.mark.parametrize(("steps", "rate"), [(4, 1e-2), (5, 1e-3)])
def test_the_rate_drops_after_its_share_of_the_steps(
    target: str, steps: int, rate: float, tmp_path: Path, interrupted: Any
) -> None:
    options = brief(gradient=("synthetic",), context=("none",), steps=10, evaluate_every=steps, target=target)
    interrupted(replace(options, out=tmp_path), steps)
    state = next(iter(saved(tmp_path).values()))["learner"]
    schedulers = [state["scheduler"]] if target == "fused" else list(state["lr_schedulers"].values())
    assert len(schedulers) == (1 if target == "fused" else 7)
    for scheduler in schedulers:
        assert scheduler["_last_lr"] == pytest.approx([rate] * len(scheduler["_last_lr"]))


def test_the_test_set_is_read_once_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(name: str, split: str = "train", *, validation: int | None = None) -> Split:
        read.append(split)
        return load(name, split, validation=validation)

    def measured(model: torch.nn.Module, split: Split, batch: int = 1000, evaluate: Any = None) -> float:
        read.append("measured")
        return error_rate(model, split, batch, evaluate)

    monkeypatch.setattr(feedforward, "load", spy)
    monkeypatch.setattr("dnifx.zoo.recipes.training.error_rate", measured)
    run(brief(gradient=("backprop", "zero")))
    assert read == ["train", "validation", *["measured"] * 6, "test"]


def test_partitions_and_table_are_shown() -> None:
    console = Console(file=io.StringIO(), width=120)
    run(brief(gradient=("backprop", "zero", "synthetic"), seeds=2), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for word in ("submod_3", "hidden.2", "Synthetic", "test error %", "backprop", "no gradient", "DNI", "cDNI", "±"):
        assert word in text


def test_nothing_is_changed_outside_a_run() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    run(brief(gradient=("synthetic",), threads=1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(LossError, match=r"the training loss is (nan|inf) by step"):
        run(brief(gradient=("backprop",), lr=(1e30,), steps=30))


def test_errors_are_measured_in_evaluation_mode_and_change_nothing() -> None:
    torch.manual_seed(0)
    model = learner(complete(brief()), Variant("backprop"), torch.zeros(32, 64)).model
    split = load("digits", "validation").flat()
    before = copy.deepcopy(model.state_dict())
    assert error_rate(model, split, batch=1) == error_rate(model, split, batch=180)
    assert model.training
    assert_same(dict(model.state_dict()), dict(before))
    model.eval()
    wrong = sum(int(model(split.inputs[i : i + 1]).argmax()) != split.targets[i] for i in range(180))
    assert error_rate(model, split) == pytest.approx(100 * wrong / 180)


@pytest.mark.slow
def test_the_default_command_orders_the_variants() -> None:
    means = {variant.name: variant.mean for variant in run(Feedforward()).variants}
    assert means["backprop"] < 2
    assert means["cDNI"] < 2.5
    assert means["DNI"] < 4
    assert means["no gradient"] > 8
