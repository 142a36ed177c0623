"""Killed runs: a sample of the long command, every call of the writer in turn, and faults that must be found."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dnifx import writing
from dnifx.zoo.recipes import RECIPES, store
from dnifx.zoo.recipes.outputs import prepare, write_whole
from dnifx.zoo.recipes.store import Checkpoint
from tests.kills.comparing import differences, different, files
from tests.kills.deaths import at_call, full_disk, in_write
from tests.kills.disks import small_disk
from tests.kills.processes import FAILED, ended
from tests.kills.recipes import BRIEF, QUICK, train, warm
from tests.kills.trials import Trials, unlike, wrong_with

STEPS = 3


def steps(out: Path) -> None:
    """Count to three as a recipe trains: go on from the checkpoint, save after each step, write the results."""
    prepare(out)
    checkpoint = Checkpoint(out / "checkpoints" / "run.pt", {"lr": 0.1})
    state = checkpoint.load() or {"step": 0, "total": torch.zeros(3)}
    while state["step"] < STEPS:
        state = {"step": state["step"] + 1, "total": state["total"] + state["step"]}
        checkpoint.save(state)
    write_whole(out / "results.json", lambda part: part.write_text("[0, 0, 1, 3]"))


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    """Trials of the job that counts."""
    return Trials(tmp_path, {"steps": steps}, small=False)


@pytest.mark.parametrize(("sent", "stride"), [(signal.SIGKILL, 1), (signal.SIGINT, 3)])
def test_a_run_that_is_killed_at_any_call_of_the_writer_ends_as_a_whole_one(
    trials: Trials, tmp_path: Path, sent: signal.Signals, stride: int
) -> None:
    whole = trials.whole("steps")
    assert files(whole.out) == {"results.json", "checkpoints/run.pt", "checkpoints/run.pt.previous"}
    assert whole.calls > 6 * STEPS
    for number in range(0, whole.calls, stride):
        out, death = tmp_path / str(number), at_call(sent, number, after=number % 2 == 1)
        assert death.fits(*ended(partial(steps, out), death)), death
        assert ended(partial(steps, out)) == (0, "")
        assert list(differences(out, whole.out)) == [], death


@pytest.mark.parametrize("kills", [True, False])
def test_a_write_that_breaks_off_leaves_the_checkpoint_before_it(trials: Trials, tmp_path: Path, kills: bool) -> None:
    whole = trials.whole("steps")
    for number in range(whole.calls - 8, whole.calls, 2):
        for size in (1, 700):
            out, death = tmp_path / f"{number}-{size}", in_write(number, size, kills)
            status, _ = ended(partial(steps, out), death)
            assert status in ((-signal.SIGXFSZ, 0) if kills else (FAILED, 0))
            assert ended(partial(steps, out)) == (0, "")
            assert list(differences(out, whole.out)) == [], death


def test_recipes_that_are_killed_at_random_go_on_bit_for_bit(tmp_path: Path) -> None:
    text = warm(tmp_path, QUICK)
    kills, drawn = 0, Trials(tmp_path, {QUICK: partial(train, QUICK, text=text)}, small=False)
    for seed in range(2):
        trial = drawn.run(seed)
        assert not trial.wrong, trial
        kills += len(trial.deaths)
    assert kills >= 3


@pytest.mark.slow
def test_every_recipe_goes_on_bit_for_bit(tmp_path: Path) -> None:
    text = warm(tmp_path)
    with small_disk(tmp_path / "disk") as small:
        pass
    for seed, name in enumerate(BRIEF):
        drawn = Trials(tmp_path / name, {name: partial(train, name, text=text)}, small)
        for number in range(3):
            trial = drawn.run(100 * seed + number)
            assert not trial.wrong, trial


def test_a_disk_that_is_full_at_any_place_leaves_the_checkpoint_before_it(trials: Trials, tmp_path: Path) -> None:
    whole, disk = trials.whole("steps").out, tmp_path / "small"
    with small_disk(disk) as small:
        if not small:
            pytest.skip("mounting a small file system is not allowed here")
        ends = set()
        for room in range(0, 1 << 17, 3 << 12):
            out, death = disk / "out", full_disk(disk, room)
            status, errors = ended(partial(steps, out), death)
            death.relieve()
            ends.add(status)
            assert not any(writing.PART in name for name in files(out)), death
            if status:
                assert "cannot be written" in errors, death
                assert ended(partial(steps, out)) == (0, "")
            assert list(differences(out, whole)) == [], death
            for name in files(out):
                (out / name).unlink()
        assert ends == {0, FAILED}


def forget(folder: Path, names: str = "*") -> None:
    """Leave what a killed run left."""


def move_late(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Write a file in its own place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if previous is not None and path.exists():
        path.replace(previous)
    write(path)
    writing.sync_folder(path.parent)


@pytest.mark.parametrize(("module", "name", "fault"), [(writing, "clear", forget), (store, "write_whole", move_late)])
def test_a_writer_with_a_fault_is_found(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, fault: Callable[..., Any]
) -> None:
    whole = trials.whole("steps")
    monkeypatch.setattr(module, name, fault)
    wrong = []
    for number in range(8, whole.calls, 4):
        out = tmp_path / str(number)
        ended(partial(steps, out), in_write(number, 600, kills=True))
        status, errors = ended(partial(steps, out))
        wrong += [errors] * bool(status or errors) + list(differences(out, whole.out))
    assert wrong


def test_a_run_that_does_not_go_on_where_it_was_is_found(trials: Trials, tmp_path: Path) -> None:
    def forgetful(out: Path) -> None:
        steps(out)
        checkpoint = Checkpoint(out / "checkpoints" / "run.pt", {"lr": 0.1})
        checkpoint.save({"step": STEPS, "total": torch.full((3,), 3.0).nextafter(torch.tensor(4.0))})

    assert ended(partial(forgetful, tmp_path / "out")) == (0, "")
    (text, *_) = differences(tmp_path / "out", trials.whole("steps").out)
    assert text.startswith("checkpoints/run.pt/state/total: tensor([3.0000")


@pytest.mark.parametrize(("total", "right"), [(0.0, True), (0.5, False)])
def test_a_run_goes_on_from_a_checkpoint_that_a_stop_left_at_another_step(
    trials: Trials, tmp_path: Path, total: float, right: bool
) -> None:
    whole, out = trials.whole("steps").out, tmp_path / "out"
    assert ended(partial(steps, out)) == (0, "")
    path = out / "checkpoints" / "run.pt"
    for state in ({"step": 1, "total": torch.full((3,), total)}, {"step": 3, "total": torch.full((3,), 3.0)}):
        Checkpoint(path, {"lr": 0.1}).save(state)
    assert (wrong_with(steps, out, whole) == []) is right


def test_what_differs_is_told_with_its_place() -> None:
    one: dict[str, Any] = {"seconds": 1.0, "curve": [(1, float("nan"))], "random": torch.zeros(2)}
    assert list(different(one, {**one, "seconds": 2.0, "curve": [(1, float("nan"))]}, "a")) == []
    assert list(different(one, {**one, "curve": [(1, 0.5)]}, "a")) == ["a/curve/0/1: nan instead of 0.5"]
    assert list(different(one, {**one, "random": -torch.zeros(2)}, "a")) != []
    assert list(different([1], [1.0], "a")) == ["a/0: 1 instead of 1.0"]


def test_a_process_that_ends_in_another_way_is_told() -> None:
    death = at_call(signal.SIGKILL, 0, False)
    status, errors = ended(lambda: 1 / 0, death)
    (text,) = unlike(death, status, errors)
    assert text.startswith("SIGKILL before writing call 0: it ended with 70: Traceback")


def test_every_recipe_has_a_short_run() -> None:
    assert set(BRIEF) == set(RECIPES)
