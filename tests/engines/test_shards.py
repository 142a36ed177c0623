"""Replicas that shard their weights: they train as averaged replicas do, and each holds its share alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import shard_jobs
from tests.engines.mesh_jobs import SQUARE
from tests.engines.pool import Failed, Pool

TWO = ((0,), (1,))
CLOSE = 1e-6
"""Where a sum over replicas is taken in another order: that of a norm, or of gradients of several steps."""


@pytest.mark.parametrize(
    ("kind", "rows", "places", "options", "saves", "close"),
    [
        ("chain", (), None, {"schedule": "fit_every{every=2}"}, False, 0.0),
        ("chain", SQUARE, [0, 0, 1, 1], {"lag": 2}, True, 0.0),
        pytest.param(
            "chain",
            ((3, 0), (1, 2)),
            "ranks",
            {"schedule": "random_order{p=0.7,seed=3}", "optimizer": "sgd"},
            False,
            0.0,
            marks=pytest.mark.slow,
        ),
        (
            "chain",
            SQUARE,
            [0, 1, 1, 0],
            {"penalty": "weigh", "autocast": torch.bfloat16, "optimizer": "adamw"},
            False,
            0.0,
        ),
        pytest.param(
            "chain", SQUARE, [1, 0, 0, 1], {"clip": 0.1, "accumulate": 3}, True, CLOSE, marks=pytest.mark.slow
        ),
        ("odd", TWO, [0, 0, 0], {"penalty": "weigh", "clip": 0.1, "accumulate": 2}, True, CLOSE),
        ("odd", SQUARE, [0, 1, 0], {"lag": 1, "clip": "clamp", "optimizer": "several"}, True, 0.0),
        pytest.param("odd", SQUARE, [0, 1, 1], {"clip": 0.1}, False, CLOSE, marks=pytest.mark.slow),
        ("suffixes", SQUARE, [0, 1, 1], {}, True, 0.0),
    ],
)
def test_sharded_replicas_train_as_averaged_ones(
    pool: Pool, tmp_path: Path, kind: str, rows: Any, places: Any, options: dict[str, Any], saves: bool, close: float
) -> None:
    count = sum(map(len, rows)) or 2
    for found in pool.run(shard_jobs.farthest, kind, rows, places, options, str(tmp_path) * saves, count=count):
        assert not isinstance(found, Failed), found.text
        assert {name: far for name, far in found.items() if far > close} == {}


def test_replicas_of_another_number_are_close_to_averaged_ones(pool: Pool) -> None:
    for found in pool.run(shard_jobs.farthest, "suffixes", ((0,), (1,), (2,)), [0, 0, 0], {}, "", count=3):
        assert max(found.values()) < CLOSE


def test_a_process_holds_its_share_alone(pool: Pool) -> None:
    (whole, first, said), (_, second, _) = pool.run(shard_jobs.held, count=2)
    assert first + second < 1.1 * whole
    assert max(first, second) < 0.55 * whole
    assert "'head.weight' is sharded over replicas" in said


def test_a_gradient_that_one_replica_alone_sees_is_left_out_on_all(pool: Pool) -> None:
    runs = pool.run(shard_jobs.spoiled, "shard", "skip", count=2)
    wanted, weights = pool.run(shard_jobs.spoiled, "average", "skip", count=2)[0]
    assert len(wanted[1]) == 2
    for skipped, found in runs:
        assert skipped == wanted
        assert [name for name, value in weights.items() if not torch.equal(found[name], value)] == []
    assert [found for found, _ in pool.run(shard_jobs.spoiled, "shard", "raise", count=2)] == [[[], "LossError"]] * 2


@pytest.mark.parametrize("culprit", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_on_one_process_ends_the_run_on_all(pool: Pool, culprit: int) -> None:
    for rank, text in enumerate(pool.run(shard_jobs.fails, culprit, count=4)):
        assert rank == culprit or (text.startswith("RankError") and f"rank {culprit} stopped in step 2" in text)


@pytest.mark.parametrize(
    ("rows", "places"), [(SQUARE, [0, 1, 1, 0]), pytest.param(TWO, [0, 0, 0, 0], marks=pytest.mark.slow)]
)
def test_weights_are_evaluated_brought_together_and_written_to(pool: Pool, rows: Any, places: Any) -> None:
    assert pool.run(shard_jobs.looks, rows, places, count=sum(map(len, rows))) == [[]] * sum(map(len, rows))


def test_replicas_meet_other_kinds_of_inputs_in_turn(pool: Pool) -> None:
    wanted = pool.run(shard_jobs.meets, "average", count=2)[0]
    for found in pool.run(shard_jobs.meets, "shard", count=2):
        assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize(
    ("saved", "rows", "places", "replicas"),
    [
        ("shard", ((0,), (1,), (2,)), [0, 0, 0, 0], "shard"),
        ("shard", [(0, 1)], [0, 1, 1, 0], None),
        ("average", SQUARE, [0, 1, 1, 0], "shard"),
    ],
)
def test_a_save_goes_on_with_other_replicas_sharded_or_not(
    pool: Pool, tmp_path: Path, saved: str, rows: Any, places: Any, replicas: str | None
) -> None:
    (wanted, state), *_ = pool.run(shard_jobs.saves, str(tmp_path), saved, count=4)
    count = sum(map(len, rows))
    runs = [
        pool.run(shard_jobs.goes_on, str(tmp_path), rows, places, replicas, each, count=count) for each in (None, state)
    ]
    for found in (each for run in runs for each in run):
        assert not isinstance(found, Failed), found.text
        assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize(
    ("kind", "rows", "places", "options", "said"),
    [
        (
            "late",
            TWO,
            [0, 0],
            {},
            "OptimizerError: replicas='shard' shards weights, and Late(k) keeps the weights of earlier steps",
        ),
        (
            "blank",
            TWO,
            [0, 0],
            {},
            "OptimizerError: replicas='shard' shards weights, and the model is on the meta device",
        ),
        ("odd", TWO, [0, 0, 0], {"optimizer": "foreach"}, "OptimizerError: the optimizer of submod_1 has foreach=True"),
        ("chain", TWO, [0, 0, 0, 0], {"optimizer": "factored"}, "OptimizerError: Adafactor cannot update the sharded"),
        (
            "chain",
            (),
            [0, 0, 1, 1],
            {},
            "PlaceError: replicas='shard' shards the weights of each place over replicas, and places=",
        ),
        ("chain", (), ["cpu:0", "cpu:1"], {}, "PlaceError: replicas='shard' shards the weights of each place"),
        ("chain", (), None, {"lag": "auto"}, "ScheduleError: lag='auto'"),
        ("chain", (), None, {"engine": "cuda-graph"}, "PlaceError: replicas='shard' runs over several processes"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    pool: Pool, kind: str, rows: Any, places: Any, options: dict[str, Any], said: str
) -> None:
    for found in pool.run(shard_jobs.refused, kind, rows, places, options, count=2):
        assert found.startswith(said)
        assert len(found) < 600
