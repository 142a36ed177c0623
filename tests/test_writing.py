"""Every writer of files and folders: an error leaves nothing behind and what was there whole; the next run clears after a kill."""

import hashlib
import os
import resource
import signal
import stat
import tarfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

import dnifx
from dnifx import cli
from dnifx.report.trace import write_chrome_trace
from dnifx.runtime.training.trainer import Trainer
from dnifx.writing import PART, write_whole, write_whole_folder
from dnifx.zoo.files import Resource, find
from dnifx.zoo.recipes.outputs import prepare
from dnifx.zoo.recipes.pictures import picture
from dnifx.zoo.recipes.store import Checkpoint
from tests.kills.comparing import files
from tests.kills.deaths import Death, at_call
from tests.kills.processes import ended

ARCHIVED = b"inside" * 999


@cache
def net() -> dnifx.DecoupledModule:
    """A small net, made once; writing does not change it."""
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))
    return dnifx.decouple(model, ["0"], args=(torch.ones(2, 4),), loss=nn.MSELoss())


@cache
def trainer() -> Trainer:
    """Its trainer."""
    return net().trainer(partial(torch.optim.SGD, lr=0.1))


def a_checkpoint(folder: Path) -> None:
    Checkpoint(folder / "run.pt", {}).save({"weights": torch.zeros(900)})


def a_picture(folder: Path) -> None:
    with picture(folder / "curve.png", "A curve", (2, 2)) as figure:
        figure.add_subplot().plot([1, 2])


def a_drawing(folder: Path) -> None:
    cli._write("<svg>" * 200, folder / "net.svg")


def a_trace(folder: Path) -> None:
    program = net().program
    write_chrome_trace(dnifx.schedules.simulate(dnifx.schedules.sequential(program), program), folder / "trace.json")


def a_package(folder: Path) -> None:
    net().to_folder(folder / "package", overwrite=True)


def a_save(folder: Path) -> None:
    trainer().save(folder)


def a_data_set(folder: Path) -> None:
    archive = folder.with_name(f"{folder.name}.tar")
    if not archive.exists():
        folder.with_name("inside").write_bytes(ARCHIVED)
        with tarfile.open(archive, "w") as made:
            made.add(folder.with_name("inside"), f"{folder.name}/inside")
    os.environ["DNIFX_DATA"] = str(folder.parent)
    whole = Resource(archive.name, hashlib.md5(archive.read_bytes()).hexdigest())
    find(Resource(f"{folder.name}/inside", hashlib.md5(ARCHIVED).hexdigest(), archive=whole))


WRITERS = [a_checkpoint, a_picture, a_drawing, a_trace, a_package, a_save, a_data_set]


def end(writer: Callable[[Path], None], folder: Path, death: Death | None = None) -> tuple[int, str]:
    """Let a writer write, in a process that may die."""
    folder.mkdir(exist_ok=True)
    return ended(partial(writer, folder), death)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what the writers import, here and not in each process."""
    for writer in WRITERS[:-1]:
        writer(tmp_path_factory.mktemp("warm"))


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder."""
    return {name: (folder / name).read_bytes() for name in files(folder)}


def full(size: int) -> Death:
    """Return the death of a process whose files may not grow beyond a size."""

    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return Death("full", f"full at {size} bytes", lambda status, errors: bool(status), arm)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("size", [0, 600])
def test_an_error_leaves_nothing_behind(writer: Callable[[Path], None], size: int, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    status, errors = end(writer, new, full(size))
    assert status
    assert "File too large" in errors
    assert files(new) == set()
    assert end(writer, old) == (0, "")
    before = content(old)
    assert before
    if writer is not a_data_set:  # which it reads where it is there
        assert end(writer, old, full(size))[0]
    assert content(old) == before


@pytest.mark.parametrize(
    "writer", [pytest.param(each, marks=[pytest.mark.slow] if each is a_picture else []) for each in WRITERS]
)
def test_what_a_killed_run_leaves_is_removed_by_the_next(writer: Callable[[Path], None], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert end(writer, whole) == (0, "")
    left = number = 0
    while True:
        folder = tmp_path / str(number)
        if not end(writer, folder, at_call(signal.SIGKILL, number, after=number % 2 == 1))[0]:
            break
        left += any(PART in name for name in (each.name for each in folder.rglob("*")))
        (folder / "inside").unlink(missing_ok=True)
        assert end(writer, folder) == (0, "")
        assert {name.removesuffix(".previous") for name in files(folder)} == files(whole), number
        assert not list(folder.rglob(f"*{PART}")), number
        number += 1
    assert left
    assert number > 2


def test_room_is_made_before_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in (".curves.png.77", ".trial", "checkpoints/.run.pt.78"):
        (tmp_path / f"{name}{PART}").write_text("half")
    status, errors = ended(partial(prepare, tmp_path), full(0))
    assert status
    assert "cannot be written" in errors
    assert files(tmp_path) == set()


def test_a_save_removes_what_was_left_at_another_step(tmp_path: Path) -> None:
    (tmp_path / f".step-7{PART}" / "half").mkdir(parents=True)
    trainer().save(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["step-0"]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", lambda part: part.write_text("linked"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "linked"
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", lambda part: part.write_text("piped"))
    assert os.read(reading, 99) == b"piped"
    os.close(reading)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_folder_that_cannot_be_moved_gives_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, rename = tmp_path / "place", Path.rename
    write_whole_folder(place, lambda made: (made / "file").write_text("old"))

    def refuse(own: Path, new: Path) -> Path:
        if own.name == "made":
            raise PermissionError("no")
        return rename(own, new)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        write_whole_folder(place, lambda made: (made / "file").write_text("new"))
    assert content(tmp_path) == {"place/file": b"old"}
    monkeypatch.undo()
    write_whole_folder(place, lambda made: (made / "file").write_text("new"))
    assert content(tmp_path) == {"place/file": b"new"}


def test_what_another_run_is_writing_stays(tmp_path: Path) -> None:
    def while_it_writes(made: Path) -> None:
        write_again = ended(lambda: write_whole_folder(tmp_path / "place", lambda made: (made / "file").touch()))
        assert write_again == (0, "")
        assert made.is_dir()

    write_whole_folder(tmp_path / "place", while_it_writes)
    assert files(tmp_path) == set()
