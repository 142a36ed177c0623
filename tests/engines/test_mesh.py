"""Replicas over places: a mesh trains as replicas of the whole net do, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import mesh_jobs
from tests.engines.mesh_jobs import SQUARE
from tests.engines.pool import Pool


@pytest.mark.parametrize(
    ("places", "options", "saves", "rows"),
    [
        ([0, 0, 1, 1], {}, False, SQUARE),
        ([1, 0, 0, 1], {"lag": 2, "clip": 0.1}, False, SQUARE),
        ("ranks", {"lag": 1, "schedule": "fit_every{every=2}"}, False, SQUARE),
        ([0, 1, 0, 1], {"schedule": "random_order{p=0.7,seed=3}"}, False, SQUARE),
        ([0, 0, 1, 1], {"lag": 2}, True, SQUARE),
        ([0, 1, 1, 0], {"accumulate": 3}, True, SQUARE),
        ([0, 0, 1, 1], {"lag": 1, "tied_lag": 2}, True, SQUARE),
        ([1, 0, 0, 1], {"lag": 1}, True, ((3, 0), (1, 2))),
    ],
)
def test_replicas_over_places_are_those_of_the_whole_net(
    pool: Pool, tmp_path: Path, places: Any, options: dict[str, Any], saves: bool, rows: mesh_jobs.Rows
) -> None:
    wanted, other = pool.run(mesh_jobs.whole, options, count=2)
    found = pool.run(mesh_jobs.over_mesh, rows, places, options, str(tmp_path) if saves else "", count=4)
    for each in (other, *found):
        assert [name for name, value in wanted.items() if not torch.equal(each[name], value)] == []


def test_a_mesh_of_one_replica_is_one_run_over_ranks(pool: Pool) -> None:
    found = pool.run(mesh_jobs.over_mesh, [(0, 1)], [0, 0, 1, 1], {"lag": 1}, count=2)
    wanted = pool.run(mesh_jobs.whole, {"lag": 1}, count=1)[0]
    assert all(torch.equal(each[name], value) for each in found for name, value in wanted.items())


@pytest.mark.parametrize(
    ("shape", "places", "options", "said"),
    [
        ((1, 1, 2), "ranks", {}, "mesh= is 3 dimensions; give two dimensions, replicas by places"),
        ((1, 2), None, {}, "mesh= arranges processes as replicas by places: give places="),
        ((1, 2), ["cpu:0", "cpu:1"], {}, "mesh= arranges processes as replicas by places: give places="),
        ((2, 1), "ranks", {"replicas": "apart"}, "replicas='apart' does not go with mesh="),
        ((1, 2), "ranks", {"lag": "auto"}, "lag='auto' measures the links of one replica"),
        (
            (1, 2),
            "ranks",
            {"replicas": "average"},
            "each process has other partitions. Leave replicas= out; give mesh=",
        ),
        ((1, 2), [0, 1, 2, 2], {}, "3 of 2 ranks have partitions"),
    ],
)
def test_what_a_mesh_cannot_run_is_refused(pool: Pool, shape: Any, places: Any, options: Any, said: str) -> None:
    for found in pool.run(mesh_jobs.refused, shape, places, options, count=2):
        assert said in found


@pytest.mark.parametrize("culprit", [0, 3])
def test_a_signal_to_one_process_stops_all_replicas_after_the_same_step(
    pool: Pool, tmp_path: Path, culprit: int
) -> None:
    found = pool.run(mesh_jobs.stopped, str(tmp_path), culprit, count=4)
    steps = found[0][0]
    assert found == [(steps, 143)] * 4
    assert [each.name for each in tmp_path.iterdir()] == [f"step-{steps}"]


@pytest.mark.parametrize("culprit", [1, 2])
def test_an_error_in_one_replica_ends_the_run_on_all(pool: Pool, culprit: int) -> None:
    found = pool.run(mesh_jobs.fails, culprit, count=4)
    for rank, text in enumerate(found):
        assert rank == culprit or f"rank {culprit} stopped in step 2" in text


def test_all_replicas_are_told_of_a_save_that_fails(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(mesh_jobs.saves_in_vain, str(tmp_path / "taken"), count=4)
    assert all("cannot be written" in each for each in found)


@pytest.mark.parametrize(
    ("rows", "places"), [([(0, 1)], [0, 1, 1, 0]), ([(0,), (1,), (2,)], [0, 0, 0, 0]), ([(0, 1, 2)], "ranks")]
)
def test_a_run_goes_on_with_another_number_of_replicas(
    pool: Pool, tmp_path: Path, rows: mesh_jobs.Rows, places: Any
) -> None:
    wanted, *_ = pool.run(mesh_jobs.saves, str(tmp_path), count=4)
    count = sum(map(len, rows))
    for found in pool.run(mesh_jobs.goes_on, str(tmp_path), rows, places, 1, count=count):
        assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []
