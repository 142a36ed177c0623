"""The experiments of the paper as recipes: which variants they set side by side, and that they run and resume."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnifx.zoo.recipes import RECIPES
from dnifx.zoo.recipes.accelerated import TIMED, WARM, Fastest, accelerated
from dnifx.zoo.recipes.feedforward import run
from dnifx.zoo.recipes.learners import learner
from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.settings import GRADIENTS, Feedforward, complete
from dnifx.zoo.recipes.training import Learner
from dnifx.zoo.recipes.variants import Variant, candidates, named, variants

BRIEF: Mapping[str, Any] = {
    "data": "digits",
    "width": 8,
    "estimator_width": 8,
    "steps": 12,
    "batch": 32,
    "seeds": 1,
    "evaluate_every": 6,
    "diagnose_every": 1,
    "probe_every": 4,
}
PAPER = ("table1", "single", "sparse", "unlock", "deep", "stale", "estimators")


def brief(name: str, **values: Any) -> Feedforward:
    options = RECIPES[name].read({**BRIEF, **values})
    assert isinstance(options, Feedforward)
    return options


def names(name: str, **values: Any) -> list[str]:
    settings = complete(brief(name, **values))
    return [named(variant, settings) for variant in variants(settings)]


def test_the_variants_are_those_of_the_paper() -> None:
    table = names("table1", layers="3..4")
    assert table[:4] == ["no gradient, 3 layers", "backprop, 3 layers", "DNI, 3 layers", "cDNI, 3 layers"]
    assert len(table) == 8
    assert names("single", position="1,5") == [
        "backprop",
        "no gradient, after layer 1",
        "no gradient, after layer 5",
        "DNI, after layer 1",
        "DNI, after layer 5",
    ]
    assert names("sparse", p=0.2) == ["DNI, p = 0.2", "cDNI, p = 0.2"]
    assert names("deep") == ["backprop", "cDNI"]
    assert len(names("estimators")) == len(GRADIENTS)


def test_every_variant_has_its_own_name_and_file() -> None:
    for name in PAPER:
        settings = complete(brief(name))
        shown = [named(variant, settings) for variant in variants(settings)]
        keys = [each.key for variant in variants(settings) for each in candidates(variant, settings)]
        assert len(set(shown)) == len(shown)
        assert len(set(keys)) == len(keys)


def test_unlocked_estimators_have_the_paper_s_one_hidden_layer() -> None:
    settings = complete(brief("unlock"))
    assert {each.hidden for variant in variants(settings) for each in candidates(variant, settings)} == {1}
    assert settings.schedule == "unlocked"


SMALL: Mapping[str, Mapping[str, Any]] = {
    "table1": {"layers": "3,4"},
    "single": {"position": "2,5"},
    "sparse": {"p": "0.3", "lag": "3"},
    "unlock": {"p": "0.7"},
    "deep": {"layers": "6"},
    "stale": {"layers": "3", "decay": "0,0.9"},
    "estimators": {"layers": "3"},
}


QUICK = ("single", "sparse", "stale")
"""Experiments whose interruption is tried in the default suite."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAPER]
)
def test_an_experiment_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = brief(name, **SMALL[name])
    whole = run(options)

    def point(line: Line, point: Point, unit: str = "") -> None:
        if point.step == 6:
            raise KeyboardInterrupt

    interruptions = 0
    with monkeypatch.context() as patch:
        patch.setattr(Line, "point", point)
        with pytest.raises(KeyboardInterrupt):
            run(replace(options, out=tmp_path))
        interruptions += 1
    assert len(list(tmp_path.glob("checkpoints/*.pt"))) == interruptions
    parts = run(replace(options, out=tmp_path))
    assert [[one.curve for one in variant.runs] for variant in parts.variants] == [
        [one.curve for one in variant.runs] for variant in whole.variants
    ]
    assert [variant.mean for variant in parts.variants] == [variant.mean for variant in whole.variants]
    looks = [[(one.looks, one.probes) for one in variant.runs] for variant in parts.variants]
    assert looks == [[(one.looks, one.probes) for one in variant.runs] for variant in whole.variants]
    assert (tmp_path / "curves.png").exists()


def test_a_single_interface_stands_at_its_position() -> None:
    settings = complete(brief("single"))
    torch.manual_seed(0)
    trainee = learner(settings, Variant("zero", layers=6, position=2), torch.zeros(32, 64))
    before = {name: value.clone() for name, value in trainee.model.named_parameters()}
    trainee.step(torch.rand(32, 64), torch.arange(32) % 10)
    still = {name.rsplit(".", 2)[0] for name, value in trainee.model.named_parameters() if value.equal(before[name])}
    assert still == {"hidden.0", "hidden.1"}


def test_validation_chooses_and_the_chosen_run_is_not_run_again(tmp_path: Path) -> None:
    options = brief("fcn", gradient="backprop", lr="1e-6,1e-2", seeds=2, out=tmp_path)
    (variant,) = run(options).variants
    errors = {each["lr"]: error for each, error in variant.candidates}
    assert variant.chosen["lr"] == min(errors, key=lambda rate: errors[rate]) == 1e-2
    assert variant.runs[0].validation_error == errors[1e-2]
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*.pt")) == [
        "backprop-layers=4-lr=0.01-seed=0.pt",
        "backprop-layers=4-lr=0.01-seed=1.pt",
        "backprop-layers=4-lr=1e-06-seed=0.pt",
    ]


class Counting:
    """Runs a learner's steps and lets the clock go on by as much as a step is said to take."""

    def __init__(self, learner: Learner, seconds: float) -> None:
        self.learner = learner
        self.seconds = seconds
        self.steps = 0

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        self.steps += 1
        return self.learner.compute(inputs, targets)


def test_the_fastest_way_is_found_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = complete(brief("fcn"))
    batch = (torch.rand(32, 64), torch.arange(32) % 10)

    def fresh() -> Learner:
        torch.manual_seed(0)
        return learner(settings, Variant("backprop", layers=3), batch[0])

    plain, tried = fresh(), fresh()
    ways = {"slow": Counting(tried, 2.0), "fast": Counting(tried, 1.0), "slower": Counting(tried, 3.0)}
    looked = [0]
    fastest = Fastest(tried, ways, lambda: sum(way.steps * way.seconds for way in ways.values()) + 100.0 * looked[0])

    def diagnosed(*batch: Tensor) -> tuple[Tensor | None, Mapping[str, Mapping[str, Tensor]]]:
        looked[0] += 1
        return tried.step(*batch), {}

    monkeypatch.setattr(tried, "diagnosed", diagnosed)
    for step in range(3 * (WARM + TIMED) + 5):
        plain.step(*batch)
        fastest.step(*batch)
        if step % 40 == 30:
            plain.step(*batch)
            fastest.diagnosed(*batch)
    assert looked == [4]
    assert fastest.way == "fast"
    assert fastest.seconds == {"slow": 2.0, "fast": 1.0, "slower": 3.0}
    assert ways["fast"].steps == WARM + TIMED + 5
    for ours, theirs in zip(fastest.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = Fastest(tried, ways, float)
    again.load_state_dict(fastest.state_dict())
    assert again.way == "fast"


@pytest.mark.cuda
@pytest.mark.parametrize("gradient", ["backprop", "synthetic"])
@pytest.mark.parametrize("target", ["scheduled", "fused"])
def test_a_captured_step_trains_as_an_eager_one_does(gradient: str, target: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    settings = complete(brief("fcn", target=target, steps=20))
    inputs, targets = torch.rand(32, 64, device=device), torch.arange(32, device=device) % 10
    variant = Variant(gradient, "label" if gradient == "synthetic" else "none", layers=3, lr=1e-3)
    models: list[nn.Module] = []
    for step in ("eager", "graph"):
        torch.manual_seed(0)
        trained = accelerated(learner(settings, variant, inputs), step, False, device)
        for shift in range(20):
            trained.step(inputs.roll(shift, 0), targets.roll(shift, 0))
        models.append(trained.model)
    for eager, graph in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sparse_updates_still_train() -> None:
    (variant,) = run(RECIPES["sparse"].read({"data": "digits", "context": "label", "p": 0.2, "seeds": 1})).variants
    assert variant.mean < 4
