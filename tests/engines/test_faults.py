"""Faults: a signal, a rank that dies, is slow or silent, and runs that go on afterwards, on fewer ranks and on more."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from dnifx.errors import RankError, StateError
from tests.engines import fault_jobs, jobs
from tests.engines.pool import Failed, Pool, started, torchrun


@pytest.mark.parametrize(
    ("count", "culprit", "lag", "schedule", "then"),
    [
        (2, 0, 0, "sequential", 3),
        (3, 2, 4, "sequential", 2),
        (2, 1, 3, "fit_every{every=2}", 1),
        (3, 1, 1, "random_order{p=0.7,seed=3}", 3),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    pool: Pool, tmp_path: Path, count: int, culprit: int, lag: int, schedule: str, then: int
) -> None:
    found = pool.run(fault_jobs.signalled, str(tmp_path), 5, culprit, lag, schedule, "ranks", count=count)
    assert {code for _, code in found} == {128 + signal.SIGTERM}, found
    assert len({steps for steps, _ in found}) == 1, found
    assert found[0][0] > 5
    places = "ranks" if then > 1 else None
    assert pool.run(fault_jobs.resumed, str(tmp_path), lag, schedule, places, count=then) == [""] * then


def test_a_signal_in_one_process_saves_the_step_that_runs(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    _, trainer = fault_jobs.made(None, 2)
    trainer.save_on_signal(tmp_path / "saves", [signal.SIGUSR1])
    *data, (x, y) = jobs.batches(4)
    jobs.train(trainer, data)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(SystemExit) as caught:
        trainer.step(x, target=y)
    assert caught.value.code == 128 + signal.SIGUSR1
    assert [each.name for each in (tmp_path / "saves").iterdir()] == ["step-4"]
    assert signal.getsignal(signal.SIGUSR1) is before
    assert fault_jobs.resumed(str(tmp_path / "saves"), 2, "sequential", None) == ""


def test_signals_are_taken_in_the_main_thread_alone(tmp_path: Path) -> None:
    _, trainer = fault_jobs.made(None, 0)
    caught: list[Exception] = []

    def listen() -> None:
        try:
            trainer.save_on_signal(tmp_path)
        except StateError as error:
            caught.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_without_a_save_nothing_is_loaded(tmp_path: Path) -> None:
    _, trainer = fault_jobs.made(None, 0)
    assert not trainer.load(tmp_path / "nowhere", missing_ok=True)
    assert trainer.steps == 0


@pytest.mark.parametrize(("count", "culprit", "lag"), [(3, 0, 0), (3, 1, 3), (2, 1, 4)])
def test_a_slow_rank_changes_nothing_but_time(pool: Pool, count: int, culprit: int, lag: int) -> None:
    assert pool.run(fault_jobs.slow, lag, culprit, count=count) == [""] * count


def test_a_rank_that_dies_is_named_where_all_wait_for_all() -> None:
    with started(2) as own:
        first, second = own.run(fault_jobs.gone, 1, count=2)
    assert second.kind == "died"
    assert first.kind == RankError.__name__, first
    assert "rank 1 is gone" in first.text, first


@pytest.mark.slow
def test_a_silent_rank_counts_as_gone_after_a_time() -> None:
    with started(3) as own:
        answers = own.run(fault_jobs.silent, 1, 5.0, count=3)
    for each in answers:
        assert isinstance(each, Failed)
        assert each.kind == RankError.__name__, each
    assert "rank 1 is gone" in answers[0].text


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_goes_on_from_its_last_save(tmp_path: Path) -> None:
    torchrun(2, 1, "-m", "tests.engines.restarted", str(tmp_path))
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    net, trainer = fault_jobs.made(None, 2)
    jobs.train(trainer, jobs.batches(12))
    assert 3 <= end["begun"] <= 7
    assert all(torch.equal(value, end["net"][name]) for name, value in net.state_dict().items())
