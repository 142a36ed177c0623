"""Looks at the synthetic gradients of a run: they change nothing, and are shown, saved, resumed and drawn."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import dnifx
from dnifx import Watch
from dnifx.zoo import FCN
from dnifx.zoo.batches import Batches
from dnifx.zoo.data import load
from dnifx.zoo.recipes.diagnosis import Look, Row, draw_looks
from dnifx.zoo.recipes.feedforward import run
from dnifx.zoo.recipes.learners import learner
from dnifx.zoo.recipes.results import Run
from dnifx.zoo.recipes.settings import GRADIENTS, Feedforward, complete
from dnifx.zoo.recipes.training import Learner
from dnifx.zoo.recipes.variants import Variant, candidates, variants

BRIEF = Feedforward(
    layers=(3,), width=8, estimator_width=8, steps=12, batch=32, seeds=1, evaluate_every=6, lr=(1e-2,), diagnose_every=3
)
BATCH = (torch.rand(32, 64, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10)
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "scheduled": {},
    "fused": {"target": "fused"},
    "random_order": {"schedule": "random_order", "p": (0.5,)},
    "unlocked": {"schedule": "unlocked", "p": (0.5,)},
}


NEEDS_A_STEP = ("critic", "sobolev", "local_loss", "direct_feedback")
"""Gradients that the fused target does not have."""


def brief(**values: Any) -> Feedforward:
    return replace(BRIEF, **values)


def fresh(options: Feedforward, variant: Variant) -> Learner:
    torch.manual_seed(0)
    return learner(complete(options), variant, BATCH[0])


def looks_of_a_run() -> list[Look]:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.arange(64) % 3
    net = dnifx.decouple(FCN(8, 3, 3, 16), "hidden.*", args=(x,), loss=cross_entropy)
    trainer, watch, looks = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2)), Watch(), []
    for step in range(1, 31):
        watch.see(trainer.step(x, target=y, diagnose=True).diagnostics)
        looks += [Look.at(step, watch.averages)] if step % 10 == 0 else []
    return looks


@pytest.mark.parametrize(
    ("way", "gradient"),
    [
        *(("scheduled", gradient) for gradient in GRADIENTS),
        *(("fused", gradient) for gradient in GRADIENTS if gradient not in NEEDS_A_STEP),
        *((way, "synthetic") for way in ("random_order", "unlocked")),
    ],
)
def test_looking_does_not_change_what_is_trained(way: str, gradient: str) -> None:
    options = brief(gradient=(gradient,), **SCHEDULES[way])
    for variant in variants(complete(options)):
        plain, looked = fresh(options, variant), fresh(options, variant)
        for step in range(1, 8):
            loss = plain.step(*BATCH)
            seen, found = looked.diagnosed(*BATCH) if step % 2 else (looked.step(*BATCH), {})
            true = looked.probe(*BATCH)
            assert (loss is None) == (seen is None)
            assert loss is None or seen is None or torch.equal(loss, seen)
            if way in ("scheduled", "fused") and step % 2:
                assert set(found) >= ({"hidden.0", "hidden.1"} if variant.guesses else set())
            assert set(true) >= ({"hidden.0", "hidden.1"} if variant.guesses else set())
        ours, theirs = pytree.tree_leaves(looked.state_dict()), pytree.tree_leaves(plain.state_dict())
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_both_targets_see_the_same() -> None:
    variant = Variant("synthetic", "label", layers=3, lr=1e-2)
    fused, scheduled = (fresh(brief(target=target), variant) for target in ("fused", "scheduled"))
    for _ in range(3):
        for name, numbers in fused.probe(*BATCH).items():
            torch.testing.assert_close(numbers, scheduled.probe(*BATCH)[name])
        true = scheduled.probe(*BATCH)
        (_, ours), (_, theirs) = fused.diagnosed(*BATCH), scheduled.diagnosed(*BATCH)
        assert set(ours) == set(theirs) == {"hidden.0", "hidden.1"}
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5, equal_nan=True)
        # The last boundary's target is the true gradient, and no other's is.
        torch.testing.assert_close(true["hidden.1"], theirs["hidden.1"], rtol=1e-3, atol=1e-5, equal_nan=True)
        assert true["hidden.0"]["target_norm"] != theirs["hidden.0"]["target_norm"]


@pytest.mark.parametrize("target", ["fused", "scheduled"])
def test_a_run_is_looked_at_and_drawn(target: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    options = brief(gradient=("backprop", "synthetic"), target=target, probe_every=4, seeds=2, out=tmp_path)
    backprop, plain, labelled = run(options, console).variants
    assert not backprop.runs[0].looks
    for one in (*plain.runs, *labelled.runs):
        assert [look.step for look in one.looks] == [3, 6, 9, 12]
        assert [probe.step for probe in one.probes] == [4, 8, 12]
        assert set(one.looks[0].boundaries) == set(one.probes[0].boundaries) == {"hidden.0", "hidden.1"}
    saved = json.loads((tmp_path / "results.json").read_text())["variants"][2]["runs"][1]
    assert saved["looks"] == [asdict(look) for look in labelled.runs[1].looks]
    assert saved["probes"] == [asdict(probe) for probe in labelled.runs[1].probes]
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(console.file, io.StringIO)
    text = " ".join(console.file.getvalue().split())
    assert "results.json, curves.png and diagnostics.png are in" in text
    assert str(plain.runs[1].looks[-1]) in text


def test_a_run_probes_validation_examples_after_a_step() -> None:
    options = brief(gradient=("synthetic",), context=("label",), probe_every=12)
    (variant,) = run(options).variants
    settings, train, validation = complete(options), load("digits").flat(), load("digits", "validation").flat()
    torch.manual_seed(0)
    trained = learner(settings, candidates(variants(settings)[0], settings)[0], train.inputs[:32])
    batches = Batches(train, 32, seed=0)
    for _ in range(12):
        trained.step(*batches.next())
    expected = trained.probe(validation.inputs[:32], validation.targets[:32])
    assert variant.runs[0].probes == (Look.at(12, expected),)


def test_nothing_is_looked_at_where_it_is_not_asked_for(tmp_path: Path) -> None:
    for options in (brief(gradient=("synthetic",), diagnose_every=0), brief(gradient=("backprop", "zero", "oracle"))):
        found = run(replace(options, probe_every=0 if options.diagnose_every == 0 else 2, out=tmp_path)).variants
        assert not any(one.looks or one.probes for variant in found for one in variant.runs)
        assert not (tmp_path / "diagnostics.png").exists()


def weights_of(options: Feedforward, folder: Path) -> list[Any]:
    run(replace(options, out=folder))
    (path,) = folder.glob("checkpoints/*.pt")
    return pytree.tree_leaves(torch.load(path, weights_only=True)["state"]["learner"])


def test_a_run_that_is_looked_at_ends_with_the_same_weights(tmp_path: Path) -> None:
    options = brief(gradient=("synthetic",), context=("none",))
    plain = weights_of(replace(options, diagnose_every=0), tmp_path / "plain")
    looked = weights_of(replace(options, diagnose_every=1, probe_every=1), tmp_path / "looked")
    assert len(plain) == len(looked) > 20
    for mine, other in zip(looked, plain, strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_a_checkpoint_without_looks_is_taken_up(tmp_path: Path) -> None:
    options = brief(gradient=("synthetic",), context=("label",), out=tmp_path)
    first = run(replace(options, diagnose_every=0)).variants[0].runs[0]
    (path,) = tmp_path.glob("checkpoints/*.pt")
    content = torch.load(path, weights_only=True)
    del content["state"]["diagnosis"]
    torch.save(content, path)
    assert run(options).variants[0].runs[0] == first


HARMFUL = Feedforward(
    layers=(3,),
    width=8,
    estimator_width=8,
    steps=80,
    batch=32,
    seeds=1,
    evaluate_every=70,
    lr=(1e-3,),
    estimator_lr=(100.0,),
    gradient=("synthetic",),
    context=("label",),
    diagnose_every=1,
)


def test_harm_is_told_once_with_the_remedy(tmp_path: Path) -> None:
    def told() -> tuple[Run, str]:
        console = Console(file=io.StringIO(), width=120)
        (variant,) = run(replace(HARMFUL, out=tmp_path), console).variants
        assert isinstance(console.file, io.StringIO)
        return variant.runs[0], " ".join(console.file.getvalue().split())

    first, text = told()
    assert any("has run away" in harm and "a lower --estimator-lr" in harm for harm in first.harms)
    for harm in first.harms:
        assert harm.startswith("step ")
        assert text.count(f"cDNI, seed 0, {harm}") == 1
    again, text = told()
    assert again == first
    assert "cDNI, seed 0, step" not in text


def test_looks_are_json_a_line_and_a_picture(tmp_path: Path) -> None:
    looks = looks_of_a_run()
    assert [look.step for look in looks] == [10, 20, 30]
    read = json.loads(json.dumps([asdict(look) for look in looks]))
    assert set(read[0]["boundaries"]) == {"hidden.0", "hidden.1"}
    assert set(read[0]["boundaries"]["hidden.0"]) == {"cosine", "parameter_cosine", "relative_error", "wrong_signs"}
    worst = min(looks[0].boundaries.items(), key=lambda item: item[1]["cosine"])
    assert str(looks[0]) == f"cosine {worst[1]['cosine']:.2f} at {worst[0]}"
    draw_looks("a run", [Row("one", [looks])], tmp_path / "one.png")
    draw_looks("a run", [Row("one", [looks], [looks[:1]])], tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_no_estimates_are_an_empty_line(tmp_path: Path) -> None:
    assert str(Look.at(1, Watch().averages)) == ""


def test_what_is_no_number_is_left_out() -> None:
    look = Look.at(3, {"a": {"cosine": 0.5, "relative_error": math.nan, "wrong_signs": 0.25}})
    assert look.boundaries == {"a": {"cosine": 0.5, "wrong_signs": 0.25}}
    assert str(look) == "cosine 0.50 at a"
