"""Variants train as their names say: every option has its effect."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from dnifx.errors import OptionError
from dnifx.zoo import FCN
from dnifx.zoo.data import load
from dnifx.zoo.recipes import feedforward, learners
from dnifx.zoo.recipes.feedforward import run
from dnifx.zoo.recipes.learners import decoupled, learner, network
from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.settings import GRADIENTS, Feedforward, complete
from dnifx.zoo.recipes.training import Learner, error_rate, train
from dnifx.zoo.recipes.variants import CONTEXTUAL, LABELLED, Variant, candidates

BRIEF = Feedforward(
    layers=(3,), width=8, estimator_width=6, steps=8, batch=32, seeds=1, evaluate_every=4, lr=(1e-2,), diagnose_every=0
)
INPUTS = torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(32) % 10


def brief(**values: Any) -> Feedforward:
    return replace(BRIEF, **values)


def after(steps: int, variant: Variant, **options: Any) -> Learner:
    torch.manual_seed(0)
    trained = learner(complete(brief(**options)), variant, INPUTS)
    for _ in range(steps):
        trained.step(INPUTS, CLASSES)
    return trained


def weights(trained: Learner) -> Mapping[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.model.named_parameters()}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


SYNTHETIC = Variant("synthetic", layers=3, lr=1e-2, estimator_lr=1e-2, hidden=1)


@pytest.mark.parametrize("target", ["scheduled", "fused"])
@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"estimator_lr": 1e-3}, {"hidden": 0}, {"context": "label"}, {"position": 1}]
)
def test_what_a_variant_chooses_reaches_its_training(change: Mapping[str, Any], target: str) -> None:
    plain, other = after(6, SYNTHETIC, target=target), after(6, replace(SYNTHETIC, **change), target=target)
    assert not same(weights(plain), weights(other))


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        (Variant("stale", layers=3, decay=0.0), {"decay": 0.99}),
        (Variant("critic", "label", layers=3, hidden=0), {"hidden": 1}),
        (Variant("local_loss", "label", layers=3, hidden=0), {"estimator_lr": 1e-4}),
    ],
)
def test_what_other_variants_choose_reaches_their_training(variant: Variant, change: Mapping[str, Any]) -> None:
    assert not same(weights(after(6, variant)), weights(after(6, replace(variant, **change))))


def test_sizes_are_those_of_the_options() -> None:
    settings = complete(brief(width=7, estimator_width=5, layers=(4,)))
    model = network(settings, 3)
    assert [tuple(value.shape) for value in model.parameters() if value.dim() > 1] == [(7, 64), (7, 7), (10, 7)]
    net = decoupled(settings, replace(SYNTHETIC, context="label"), model, INPUTS)
    assert sorted(tuple(value.shape) for value in net.interface_parameters() if value.dim() > 1) == [
        *[(5, 17)] * 2,
        *[(7, 5)] * 2,
    ]
    assert len(weights(learner(settings, Variant("backprop", layers=3), INPUTS))) == 2 * 4 + 2


def test_filters_are_those_of_the_options_and_lie_innermost() -> None:
    model = network(complete(brief(net="cnn", width=7)), 3)
    filters = [value for value in model.parameters() if value.dim() == 4]
    assert [tuple(value.shape) for value in filters] == [(7, 1, 5, 5), (7, 7, 5, 5)]
    assert filters[1].is_contiguous(memory_format=torch.channels_last)


def test_every_gradient_trains_in_its_own_way() -> None:
    found = {}
    for gradient in GRADIENTS:
        variant = Variant(gradient, "label" if gradient in LABELLED | CONTEXTUAL else "none", layers=3, hidden=0)
        found[gradient] = weights(after(6, variant))
    del found["oracle"]
    for ours, theirs in ((ours, theirs) for ours in found for theirs in found if ours < theirs):
        assert not same(found[ours], found[theirs]), (ours, theirs)


@pytest.mark.parametrize(
    ("gradient", "context", "target"),
    [
        *product(("synthetic", "sigmoid_linear"), ("none", "label"), ("scheduled", "fused")),
        *product(sorted(LABELLED), ("label",), ("scheduled",)),
    ],
)
def test_only_a_label_as_context_reaches_the_first_layer_at_once(gradient: str, context: str, target: str) -> None:
    trained = after(4, Variant(gradient, context, layers=3, hidden=0), target=target)
    state = copy.deepcopy(trained.state_dict())
    found = []
    for shift in (0, 1):
        trained.load_state_dict(copy.deepcopy(state))
        trained.step(INPUTS, CLASSES.roll(shift))
        found.append(weights(trained))
    equal = {name: torch.equal(found[0][name], found[1][name]) for name in found[0]}
    assert equal["hidden.0.linear.weight"] == (context == "none")
    assert not equal["classifier.weight"]


@pytest.mark.parametrize("gradient", sorted(LABELLED | CONTEXTUAL))
def test_critics_see_the_loss_of_each_example(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def spy(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        seen.add(reduction)
        return cross_entropy(output, target, reduction=reduction)

    monkeypatch.setattr(functional, "cross_entropy", spy)
    after(2, Variant(gradient, "label", layers=3, hidden=0))
    assert ("mean" in seen) == (gradient not in {"critic", "sobolev"})


@pytest.mark.parametrize(("schedule", "source"), [("random_order", "RandomOrder"), ("unlocked", "Unlocked")])
def test_a_drawn_schedule_has_its_probability_and_its_seed(schedule: str, source: str) -> None:
    settings = complete(brief(schedule=schedule, p=(0.3, 0.7)))
    for seed, p in ((0, 0.3), (5, 0.7)):
        trained = learner(settings, replace(SYNTHETIC, p=p), INPUTS, seed)
        assert trained.state_dict()["schedule"] == {"source": source, "p": p, "seed": seed}


def test_a_step_of_a_sparse_variant_updates_some_partitions() -> None:
    trained = after(0, replace(SYNTHETIC, p=0.3), schedule="random_order", p=(0.3,))
    states = [weights(trained)]
    for _ in range(60):
        trained.step(INPUTS, CLASSES)
        states.append(weights(trained))
    names = ("hidden.0.linear.weight", "hidden.1.linear.weight", "classifier.weight")
    updates = [not torch.equal(old[name], new[name]) for old, new in pairwise(states) for name in names]
    assert 0.2 < sum(updates) / len(updates) < 0.4


def test_unlocked_layers_have_synthetic_inputs() -> None:
    settings = complete(brief(schedule="unlocked", p=(0.5,)))
    net = decoupled(settings, SYNTHETIC, network(settings, 3), INPUTS)
    assert all(interface.input_model is not None for interface in net.program.interfaces)


def test_deep_networks_learn_more_slowly_unless_told_or_on_the_papers_budget() -> None:
    deep = complete(Feedforward(data="mnist", layers=(21,)))
    assert (deep.lr, deep.estimator_lr, deep.hidden) == ((1e-4,), (5e-4,), (1,))
    assert (deep.estimator_width, deep.steps) == (256, 12000)
    assert complete(Feedforward(data="mnist", layers=(3, 21))).lr == (1e-3,)
    assert complete(Feedforward(data="mnist", layers=(21,), lr=(2e-3,))).lr == (2e-3,)
    assert complete(Feedforward(data="mnist", layers=(21,), budget="paper")).lr == (3e-5,)


def test_presets_distinguish_synthetic_gradients_without_a_label() -> None:
    settings = complete(Feedforward(data="mnist"))
    (plain,), (labelled,) = (
        candidates(Variant("synthetic"), settings),
        candidates(Variant("synthetic", "label"), settings),
    )
    assert (plain.lr, plain.estimator_lr, plain.hidden) == (3e-5, 1e-3, 2)
    assert (labelled.lr, labelled.estimator_lr, labelled.hidden) == (1e-3, 1e-3, 0)


@pytest.mark.parametrize("gradient", sorted(LABELLED))
def test_heads_have_a_rate_of_their_own(gradient: str) -> None:
    maps, units = Feedforward(net="cnn", data="cifar10"), Feedforward(data="cifar10")
    asked = [
        (maps, 1e-3),
        (units, 1e-3),
        (replace(maps, estimator_lr=(1e-5,)), 1e-5),
        (replace(maps, estimator_lr=(1e-5,), head_lr=(2e-3,)), 2e-3),
        (replace(maps, lr=(5e-4,)), 5e-4),
        (replace(maps, budget="paper"), 3e-5),
    ]
    for options, rate in asked:
        (found,) = candidates(Variant(gradient, "label"), complete(options))
        assert found.estimator_lr == rate, options
    (estimator,) = candidates(Variant("synthetic", "label"), complete(replace(maps, head_lr=(2e-3,))))
    assert estimator.estimator_lr == 1e-5
    assert len(candidates(Variant(gradient, "label"), complete(replace(maps, head_lr=(1e-3, 1e-4))))) == 2


def test_unlocked_networks_have_faster_estimators_unless_told_or_on_the_papers_budget() -> None:
    unlocked = Feedforward(data="mnist", schedule="unlocked", p=(0.5,))
    asked = [unlocked, replace(unlocked, lr=(0.01,)), replace(unlocked, budget="paper")]
    found = [(each.lr, each.estimator_lr) for each in map(complete, asked)]
    assert found == [((3e-4,), (3e-3,)), ((0.01,), (0.01,)), ((3e-5,), (3e-5,))]


def test_a_rare_loss_is_waited_for_unless_told() -> None:
    rare = Feedforward(data="mnist", schedule="random_order", p=(0.5, 0.05), steps=2000)
    assert complete(rare).evaluate_every == 400
    assert complete(replace(rare, steps=24_000)).evaluate_every == 1200
    assert complete(replace(rare, steps=100)).evaluate_every == 100
    assert complete(replace(rare, evaluate_every=7)).evaluate_every == 7
    assert complete(replace(rare, schedule="sequential", p=())).evaluate_every == 100


def states(options: Feedforward, folder: Path) -> Mapping[str, Any]:
    """Run, and return what the checkpoints hold, by variant and seed as their files are named."""
    run(replace(options, out=folder))
    return {path.stem: torch.load(path, weights_only=True)["state"] for path in sorted(folder.glob("checkpoints/*.pt"))}


def test_a_seed_has_its_own_weights_batches_and_draws(tmp_path: Path) -> None:
    # So small a rate leaves every weight as it was drawn.
    options = brief(schedule="random_order", p=(0.5,), gradient=("synthetic", "zero"), seeds=2, lr=(1e-30,), steps=4)
    found = states(options, tmp_path)
    assert len(found) == 6
    kept = [
        [state["batches"]["order"] for state in found.values()],
        [torch.tensor(state["learner"]["schedule"]["seed"]) for state in found.values()],
        [weight_of(state["learner"]["net"], "hidden.0.linear.weight") for state in found.values()],
    ]
    seeds = [name[-1] for name in found]
    for values in kept:
        for seed, value in zip(seeds, values, strict=True):
            assert torch.equal(value, values[seeds.index(seed)])
        assert not torch.equal(values[seeds.index("0")], values[seeds.index("1")])


def weight_of(net: Mapping[str, Tensor], name: str) -> Tensor:
    return next(value for key, value in net.items() if key.endswith(name))


def test_the_test_error_is_that_of_the_weights_after_the_last_step(tmp_path: Path) -> None:
    options = brief(gradient=("backprop",), out=tmp_path)
    (variant,) = run(options).variants
    (path,) = tmp_path.glob("checkpoints/*.pt")
    model = FCN(64, 10, 3, 8)
    model.load_state_dict(torch.load(path, weights_only=True)["state"]["learner"]["module"])
    assert variant.runs[0].test_error == error_rate(model, load("digits", "test").flat())
    assert variant.runs[0].validation_error == error_rate(model, load("digits", "validation").flat())


@pytest.mark.parametrize("target", ["scheduled", "fused"])
def test_a_resumed_run_draws_the_same_random_numbers(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropping(settings: Any, layers: int) -> nn.Module:
        model = network(settings, layers)
        model.get_submodule("hidden.0").add_module("dropout", nn.Dropout(0.5))
        return model

    monkeypatch.setattr(learners, "network", dropping)
    options = brief(gradient=("synthetic",), context=("none",), target=target)
    whole = run(options)

    def point(line: Line, point: Point, unit: str = "") -> None:
        if point.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Line, "point", point)
        with pytest.raises(KeyboardInterrupt):
            run(replace(options, out=tmp_path))
    torch.rand(3)
    assert run(replace(options, out=tmp_path)).variants[0].runs[0].curve == whole.variants[0].runs[0].curve


def test_threads_and_precision_are_those_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((torch.get_num_threads(), torch.get_float32_matmul_precision()))
        return train(*args, **kwargs)

    monkeypatch.setattr(feedforward, "train", spy)
    run(brief(gradient=("backprop",), threads=3, matmul="medium"))
    assert seen == [(3, "medium")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lag": "auto"}, "--lag: auto measures the links between ranks"),
        ({"lag": "-1"}, "--lag: got -1, expected 0 or more, or auto"),
        ({"lag": "many"}, "--lag: got many, expected 0 or more, or auto"),
    ],
)
def test_a_lag_that_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        complete(replace(Feedforward(), **options))


def test_a_lag_is_a_number_or_chosen_over_ranks() -> None:
    assert complete(Feedforward()).lag == 0
    assert complete(Feedforward(lag="4")).lag == 4
    assert complete(Feedforward(lag="auto", places="ranks")).lag == "auto"
