"""The delayed cue: truncated backpropagation stays at chance, synthetic gradients solve it, and over any delay exact ones."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import dnifx
from dnifx.errors import EstimatorError, OptionError
from dnifx.estimators import SyntheticState
from dnifx.zoo.delayed_cue import CueCells, DelayedCue, learn, learner
from dnifx.zoo.recipes import RECIPES
from dnifx.zoo.recipes.delayed_cue import CueResults

EPISODES = 3000
LONG = 60


def test_an_episode_asks_four_windows_after_the_cue() -> None:
    task = DelayedCue(steps=3, batch=5)
    inputs, cues = task.episode(torch.Generator().manual_seed(0))
    assert inputs.shape == (5, 5, 3, 3)
    steps = inputs.transpose(0, 1).flatten(1, 2)
    assert torch.equal(steps[:, 0, :2].argmax(1), cues)
    assert torch.equal(steps[..., 2].argmax(1), torch.full((5,), 12))
    assert steps.sum() == 10


@pytest.mark.parametrize("gradient", ["zero", "exact"])
def test_an_exact_gradient_reaches_the_cue_from_windows_of_one_step(gradient: str) -> None:
    task = DelayedCue(steps=1, batch=4, windows=7)
    trainer, generator = learner(gradient, 0, 20, task, CueCells), torch.Generator().manual_seed(0)
    before = trainer.net.get_parameter("cell.new.weight")[:, :2].detach().clone()
    inputs, cues = task.episode(generator)
    trainer.reset()
    for window, x in enumerate(inputs):
        trainer.step(x, target=(cues, window == 6))
    after = trainer.net.get_parameter("cell.new.weight")[:, :2].detach()
    assert torch.equal(after, before) == (gradient == "zero")


@pytest.mark.parametrize("gradient", ["zero", SyntheticState(hidden=0)], ids=["truncated", "synthetic"])
def test_truncated_backpropagation_leaves_the_weights_from_the_cue_as_they_are(gradient: Any) -> None:
    task = DelayedCue(batch=4)
    trainer, generator = learner(gradient, 0, 20, task), torch.Generator().manual_seed(0)
    before = cue_weights(trainer)
    for _ in range(5):
        inputs, cues = task.episode(generator)
        trainer.reset()
        for window, x in enumerate(inputs):
            trainer.step(x, target=(cues, window == 4))
    assert torch.equal(cue_weights(trainer), before) == (gradient == "zero")


def cue_weights(trainer: dnifx.Trainer) -> torch.Tensor:
    return trainer.net.get_parameter("core.weight_ih_l0")[:, :2].detach().clone()


def test_both_variants_begin_at_chance() -> None:
    assert 0.35 < statistics.fmean(learn("zero", seed=0, episodes=20)) < 0.65


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_synthetic_gradients_solve_what_truncated_backpropagation_cannot(seed: int) -> None:
    solved = statistics.fmean(learn(SyntheticState(hidden=0), seed, EPISODES)[-40:])
    truncated = statistics.fmean(learn("zero", seed, EPISODES)[-40:])
    assert solved > 0.95
    assert 0.45 < truncated < 0.55


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_gradients_solve_a_delay_of_ninety_nine_windows(seed: int) -> None:
    task = DelayedCue(steps=1, windows=100)
    assert statistics.fmean(learn("exact", seed, LONG, task, CueCells, 1e-2)[-20:]) > 0.95


def test_the_recipe_has_the_exact_gradient_where_the_network_has_one() -> None:
    recipe = RECIPES["delayed-cue"]
    options = {"variants": "truncated,exact", "episodes": 2, "seeds": 1, "batch": 4, "windows": 3, "unroll": 1}
    results = recipe.run(recipe.read({**options, "network": "mingru"}), Console(quiet=True))
    assert isinstance(results, CueResults)
    assert list(results.right) == ["truncated BPTT", "exact"]
    with pytest.raises(EstimatorError, match="no exact gradient"):
        recipe.run(recipe.read(options), Console(quiet=True))


def test_the_recipe_draws_a_picture(tmp_path: Path) -> None:
    recipe = RECIPES["delayed-cue"]
    results = recipe.run(recipe.read({"episodes": 3, "seeds": 2, "batch": 4, "out": tmp_path}), Console(quiet=True))
    assert isinstance(results, CueResults)
    assert {name: [len(each) for each in runs] for name, runs in results.right.items()} == {
        "truncated BPTT": [3, 3],
        "DNI": [3, 3],
    }
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(OptionError, match="--episodes"):
        recipe.run(recipe.read({"episodes": 0}), Console(quiet=True))
