"""Runs that are saved to folders: whole saves alone count, and a run goes on bit for bit, on another number of ranks too."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dnifx.errors import StateError
from dnifx.runtime.training import checksums
from tests.engines import jobs
from tests.engines.pool import Pool


@pytest.mark.parametrize("gradient", ["synthetic", "late"])
@pytest.mark.parametrize(
    ("stop", "first", "second"), [(6, [0, 0, 1, 1], None), (4, None, [0, 1, 1, 0]), (5, None, None)]
)
def test_a_run_goes_on_from_a_folder(
    pool: Pool, tmp_path: Path, gradient: str, stop: int, first: list[int] | None, second: list[int] | None
) -> None:
    for part, places in (("first", first), ("second", second)):
        count = 1 if places is None else 2
        found = pool.run(jobs.saved_in_a_folder, str(tmp_path), stop, part, places, gradient, count=count)
        assert found == [""] * count
    for each in tmp_path.glob("step-*"):
        lines = (each / checksums.NAME).read_text().splitlines()
        assert {line[66:] for line in lines} == {path.name for path in each.iterdir()} - {checksums.NAME}


def test_only_whole_saves_count(tmp_path: Path) -> None:
    data, trainer = jobs.batches(8), jobs.chain().trainer(jobs.adam, lag=2)
    with pytest.raises(StateError, match="no whole save"):
        trainer.load(tmp_path)
    for x, y in data[:5]:
        trainer.step(x, target=y)
        trainer.save(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-4", "step-5"]
    (tmp_path / "step-5" / ".metadata").unlink()
    other = jobs.chain().trainer(jobs.adam, lag=2)
    other.load(tmp_path)
    assert other.steps == 4
    for x, y in data[4:]:
        other.step(x, target=y)
    for x, y in data[5:]:
        trainer.step(x, target=y)
    assert jobs.differences(other.net, trainer.net) == []


def test_a_save_of_another_trainer_changes_nothing(tmp_path: Path) -> None:
    data, trainer = jobs.batches(3), jobs.chain().trainer(jobs.adam, lag=2)
    jobs.train(trainer, data)
    trainer.save(tmp_path)
    other = jobs.chain(layers=2).trainer(jobs.adam)
    before = {name: value.clone() for name, value in other.net.state_dict().items()}
    with pytest.raises(StateError, match="same model, cuts and optimizers"):
        other.load(tmp_path)
    (next((tmp_path / "step-3").glob("*.distcp"))).write_bytes(b"damaged")
    with pytest.raises(StateError, match="cannot be read"):
        trainer.load(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.net.state_dict().items())
    other.step(*data[0][:1], target=data[0][1])


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", checksums.NAME])
def test_a_flipped_bit_is_found(name: str, place: float, tmp_path: Path) -> None:
    data, trainer = jobs.batches(2), jobs.chain().trainer(jobs.adam)
    trainer.step(*data[0][:1], target=data[0][1])
    trainer.save(tmp_path)
    trainer.step(*data[1][:1], target=data[1][1])
    whole = trainer.save(tmp_path)
    content = bytearray((whole / name).read_bytes())
    content[int(place * len(content))] ^= 0x02
    (whole / name).write_bytes(content)
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    with pytest.raises(StateError, match=r"step-2 cannot be read.*remove it, to go on from the save before"):
        trainer.load(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in trainer.net.state_dict().items())
    shutil.rmtree(whole)
    trainer.load(tmp_path)
    assert trainer.steps == 1


def test_the_checksums_are_those_of_a_common_tool_and_may_be_missing(tmp_path: Path) -> None:
    trainer = jobs.chain().trainer(jobs.adam)
    whole = trainer.save(tmp_path)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", checksums.NAME], cwd=whole, check=True)
    (whole / checksums.NAME).unlink()
    trainer.load(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = jobs.chain().trainer(jobs.adam)
    with pytest.raises(StateError, match=r"file cannot be made: .*; give a folder that can be written to"):
        trainer.save_on_signal(tmp_path / "file")
    assert trainer.folder is None
