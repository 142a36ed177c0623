"""A run over several processes: results, evaluation, saving, errors."""

from pathlib import Path

import pytest
import torch

from dnifx.errors import PlaceError, ScheduleError
from dnifx.passes.automatic_lag import enough
from tests.engines import jobs
from tests.engines.pool import Failed, Pool, started


@pytest.mark.parametrize(("lag", "count"), [(0, 2), (3, 3)])
def test_evaluation_runs_over_the_same_ranks(pool: Pool, lag: int, count: int) -> None:
    assert pool.run(jobs.evaluated, lag, count=count) == [""] * count


@pytest.mark.parametrize(
    ("lag", "stop", "first", "second"), [(0, 5, 2, 3), (4, 2, 2, 2), (4, 7, 3, 2), (4, 6, 2, 1), (3, 6, 1, 3)]
)
def test_a_run_is_resumed_on_any_number_of_ranks(
    pool: Pool, tmp_path: Path, lag: int, stop: int, first: int, second: int
) -> None:
    path = str(tmp_path / "state")
    assert pool.run(jobs.resumed, lag, stop, path, "first", first, count=first) == [""] * first
    assert pool.run(jobs.resumed, lag, stop, path, "second", second, count=second) == [""] * second


def test_every_rank_is_told_the_loss(pool: Pool) -> None:
    trainer = jobs.chain().trainer(jobs.sgd, lag=2)
    expected = [float(trainer.step(x, target=y).losses["loss"]) for x, y in jobs.batches(4)]
    assert pool.run(jobs.gathered, 2, count=3) == [expected] * 3


@pytest.mark.parametrize(("culprit", "lag"), [(0, 0), (1, 4), (2, 2)])
def test_an_error_on_one_rank_ends_the_run_on_all(pool: Pool, culprit: int, lag: int) -> None:
    answers = pool.run(jobs.fails, lag, culprit, "raises", count=3)
    for rank, each in enumerate(answers):
        assert isinstance(each, Failed)
        if rank != culprit:
            assert each.kind == "RankError", each
            assert f"rank {culprit} stopped in step 5" in each.text


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_choose_a_lag_together_and_a_saved_one_stays(pool: Pool, tmp_path: Path, count: int) -> None:
    assert pool.run(jobs.chooses_a_lag, str(tmp_path / "run"), count=count) == [""] * count


def test_one_process_has_no_links_to_measure() -> None:
    with pytest.raises(ScheduleError, match="lag='auto' measures the links between ranks"):
        jobs.chain().trainer(jobs.sgd, lag="auto")


@pytest.mark.parametrize(
    ("trip", "step", "lag"), [(0.0, 0.1, 1), (0.1, 0.1, 3), (0.4, 0.05, 11), (9.0, 0.01, 64), (0.1, 0.0, 64)]
)
def test_a_lag_is_enough_for_the_way_there_and_back(trip: float, step: float, lag: int) -> None:
    assert enough(trip, step) == lag


@pytest.mark.parametrize("culprit", [0, 2])
def test_ranks_that_are_given_different_batches_are_told(pool: Pool, culprit: int) -> None:
    for each in pool.run(jobs.fails, 3, culprit, "misfits", count=3):
        assert isinstance(each, Failed)
        assert "was given another batch" in each.text, each


@pytest.mark.parametrize(("culprit", "lag"), [(1, 4)])
def test_a_rank_that_is_killed_ends_the_run_on_all(culprit: int, lag: int) -> None:
    with started(3) as own:
        answers = own.run(jobs.fails, lag, culprit, "killed", count=3)
    for rank, each in enumerate(answers):
        assert isinstance(each, Failed)
        assert each.kind == ("died" if rank == culprit else "RankError"), each
        assert rank == culprit or f"rank {culprit} is gone" in each.text, each


@pytest.mark.parametrize(
    ("places", "said"), [([0, 1, 2, 3], "4 of 2"), ([0, 0, 0, 0], "1 of 2 ranks"), ([0, 1], "2 ranks were given for 4")]
)
def test_places_that_do_not_fit_the_processes_are_refused(pool: Pool, places: list[int], said: str) -> None:
    for each in pool.run(jobs.refused, places, 0, count=2):
        assert each.startswith("PlaceError")
        assert said in each


def test_ranks_need_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PlaceError, match="torchrun"):
        jobs.chain().trainer(jobs.sgd, places="ranks")
    with pytest.raises(PlaceError, match="torchrun"):
        jobs.chain().trainer(jobs.sgd, places=[0, 0, 1, 1])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("k", "stop", "places", "then"),
    [
        (1, 1, [0, 0, 1, 1], "same"),
        (2, 7, [0, 1, 0, 1], "other ranks"),
        (3, 4, [0, 1, 2, 2], "same"),
        (2, 5, [1, 0, 2, 1], "other ranks"),
    ],
)
def test_late_true_gradients_are_those_of_one_process(
    pool: Pool, k: int, stop: int, places: list[int], then: str
) -> None:
    count = len(set(places))
    assert pool.run(jobs.late, k, stop, places, then, count=count) == [""] * count
