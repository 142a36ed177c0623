"""A rank holds the weights of its own partitions alone, and reading another one is an error."""

from pathlib import Path

import pytest
import torch
from torch import nn

import dnifx
from dnifx.runtime.training.holding import elsewhere
from tests.engines import holding_jobs, jobs
from tests.engines.pool import Pool


@pytest.mark.parametrize(
    ("net", "places", "lag"),
    [
        ("chain", [0, 0, 1, 1], 2),
        ("mixed", [0, 1, 2], 0),
        pytest.param("chain", [1, 0, 2, 0], 0, marks=pytest.mark.slow),
        pytest.param("mixed", [0, 1, 1], 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_holds_its_share(pool: Pool, net: str, places: list[int], lag: int) -> None:
    count = max(places) + 1
    assert pool.run(holding_jobs.holds_its_share, net, places, lag, count=count) == [[]] * count


@pytest.mark.parametrize(("places", "lag"), [([0, 0, 1, 1], 3), pytest.param([2, 0, 1, 0], 0, marks=pytest.mark.slow)])
def test_a_model_on_the_meta_device_goes_on_from_a_save(
    pool: Pool, tmp_path: Path, places: list[int], lag: int
) -> None:
    trainer = jobs.chain().trainer(jobs.adam, lag=lag)
    jobs.train(trainer, jobs.batches(8)[:4])
    trainer.save(tmp_path)
    count = max(places) + 1
    assert pool.run(holding_jobs.loads_on_meta, str(tmp_path), places, lag, count=count) == [[]] * count


def test_first_values_are_the_same_on_any_number_of_ranks(pool: Pool) -> None:
    found = []
    for places in ([0, 0, 0, 0], [2, 0, 1, 0]):
        answers = pool.run(holding_jobs.initializes, places, count=max(places) + 1)
        assert all(isinstance(each, dict) for each in answers), answers
        found += answers
    for each in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in each.items())
    assert float(found[0]["first.layers.0.weight"].std()) > 0.1
    assert not torch.equal(found[0]["first.layers.0.weight"], found[0]["first.layers.1.weight"])


def test_a_module_that_cannot_reset_its_weights_is_named(pool: Pool) -> None:
    for each in pool.run(holding_jobs.bare, False, count=2)[:1]:
        assert "the module '0' (Bare) has weights and no reset_parameters()" in each
    assert pool.run(holding_jobs.bare, True, count=2) == ["", ""]


def test_a_run_goes_back_to_a_save_with_its_own_weights(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(holding_jobs.goes_back, str(tmp_path), [0, 1, 1, 0], 2, count=2) == [[]] * 2


@pytest.mark.parametrize(
    ("layers", "told"), [(2, "submod_1 are"), (6, "submod_1, submod_2, submod_3, submod_4 ... are")]
)
def test_the_weights_on_other_ranks_are_named(layers: int, told: str) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    net = dnifx.decouple(model, "each", args=(torch.randn(2, 3),))
    assert elsewhere(net, [0] * layers, 0) == ""
    assert f"the present weights of {told} on other ranks" in elsewhere(net, [0, *[1] * (layers - 1)], 0)
