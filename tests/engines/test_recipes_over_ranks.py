"""Recipes over ranks: the numbers of one process, evaluation over the same ranks, resuming on another number of ranks."""

import pickle
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dnifx.errors import OptionError, PlaceError
from dnifx.zoo.recipes import feedforward
from dnifx.zoo.recipes.settings import Feedforward, complete
from tests.engines import recipe_jobs
from tests.engines.pool import Pool, torchrun


@pytest.fixture(scope="module")
def alone() -> recipe_jobs.Found:
    return recipe_jobs.trained("here")


def assert_like(found: recipe_jobs.Found, alone: Mapping[str, object]) -> None:
    assert found.keys() == alone.keys()
    own, expected = ({name: each for name, each in all.items() if name != "backprop"} for all in (found, alone))
    assert own == expected


def test_a_recipe_over_ranks_has_the_numbers_of_one_process(
    pool: Pool, alone: recipe_jobs.Found, tmp_path: Path
) -> None:
    found = pool.run(recipe_jobs.trained, "ranks", str(tmp_path), count=2)
    for each in found:
        assert isinstance(each, dict), each
        assert_like(each, alone)
        assert [point.error for point in each["backprop"][1]] == [point.error for point in alone["backprop"][1]]
    assert (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_recipe_of_convolutions_runs_over_ranks(pool: Pool) -> None:
    first, second = pool.run(recipe_jobs.trained, "ranks", "", "cnn", count=2)
    assert first == second
    assert_like(first, recipe_jobs.trained("here", net="cnn"))


def test_a_recipe_is_resumed_on_another_number_of_ranks(pool: Pool, alone: recipe_jobs.Found, tmp_path: Path) -> None:
    assert pool.run(recipe_jobs.interrupted, str(tmp_path), 6, count=2) == ["interrupted"] * 2
    for each in pool.run(recipe_jobs.trained, "ranks", str(tmp_path), count=3):
        assert isinstance(each, dict), each
        assert_like(each, alone)


@pytest.mark.parametrize(
    ("count", "culprit", "then", "step"),
    [(2, 1, 3, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, 0, 2, 4), (3, 0, 1, 2)])],
)
def test_a_recipe_that_is_sent_sigterm_goes_on_from_that_step(
    pool: Pool, alone: recipe_jobs.Found, tmp_path: Path, count: int, culprit: int, then: int, step: int
) -> None:
    """Step 2 is followed by a measurement, step 4 is in the middle between two."""
    codes = pool.run(recipe_jobs.signalled, str(tmp_path), step, culprit, count=count)
    assert codes == [128 + signal.SIGTERM] * count
    for each in pool.run(recipe_jobs.trained, "ranks", str(tmp_path), count=then):
        assert isinstance(each, dict), each
        assert_like(each, alone)


@pytest.mark.slow
def test_torchrun_restarts_a_recipe_that_goes_on_from_its_checkpoint(alone: recipe_jobs.Found, tmp_path: Path) -> None:
    torchrun(2, 1, "-m", "tests.engines.restarted_recipe", str(tmp_path))
    assert_like(pickle.loads((tmp_path / "found.pickle").read_bytes()), alone)


@pytest.mark.parametrize("options", [{"target": "fused"}, {"probe_every": 3}])
def test_what_needs_the_whole_net_is_refused_over_ranks(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="--places"):
        complete(replace(Feedforward(places="ranks"), **options))  # type: ignore[arg-type]


def test_a_recipe_over_ranks_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PlaceError, match="torchrun"):
        feedforward.run(Feedforward(places="ranks"))
