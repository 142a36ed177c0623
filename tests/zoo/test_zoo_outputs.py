"""Output folders and checkpoints: faults of the disk and kills leave the last checkpoint, and nothing beside it."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dnifx.cli import main
from dnifx.errors import DnifxWarning, OptionError, StateError
from dnifx.writing import PART
from dnifx.zoo.recipes import store
from dnifx.zoo.recipes.outputs import prepare, write_whole
from dnifx.zoo.recipes.store import Checkpoint

STATE = {"step": 3, "weights": torch.arange(40.0), "names": ["a", "b"], "pair": (1.5, None)}
BRIEF = ["--steps", "4", "--seeds", "1", "--evaluate-every", "2", "--gradient", "backprop", "--width", "4"]


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / "run.pt", {"lr": 0.1})


def same(one: Any, other: Any) -> bool:
    return str(one) == str(other)


def test_writing_whole_leaves_the_old_file_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_two_generations_are_kept(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path)
    for step in range(4):
        kept.save({"step": step})
    assert sorted(kept.path.parent.iterdir()) == [kept.path, kept.previous]
    assert kept.load() == {"step": 3}
    kept.path.unlink()  # killed between the two moves
    assert kept.load() == {"step": 2}


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    kept = checkpoint(tmp_path_factory.mktemp("run"))
    kept.save(STATE)
    content = bytearray(kept.path.read_bytes())
    where = int(place * (len(content) - len(store.SEAL) - 64))
    content[where] ^= 1 << bit
    kept.path.write_bytes(content)
    with pytest.raises(StateError, match=r"run\.pt cannot be read as a checkpoint: it is damaged"):
        kept.load()


@given(share=st.floats(0, 1))
def test_a_checkpoint_that_was_cut_short_gives_way_to_the_one_before(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    kept = checkpoint(tmp_path_factory.mktemp("run"))
    kept.save(STATE)
    kept.save({"step": 4})
    content = kept.path.read_bytes()
    kept.path.write_bytes(content[: int(share * (len(content) - len(store.SEAL) - 65))])
    with pytest.warns(DnifxWarning, match="resumes from the checkpoint before it"):
        assert same(kept.load(), STATE)


def test_a_checkpoint_without_a_checksum_is_taken(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path)
    kept.path.parent.mkdir()
    torch.save({"format": store.FORMAT, "settings": {"lr": 0.1}, "state": STATE}, kept.path)
    assert same(kept.load(), STATE)


def test_files_of_killed_runs_are_removed_and_those_of_running_ones_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    left = [tmp_path / f".results.json.77{PART}", folder / f".run.pt.78{PART}"]
    for each in left:
        each.write_text("half")
    mine = folder / ".mine"
    mine.write_text("keep")

    def while_it_writes(part: Path) -> None:
        prepare(tmp_path)
        assert part.exists()
        part.write_text("whole")

    write_whole(folder / "other.pt", while_it_writes)
    assert sorted(folder.iterdir()) == [mine, folder / "other.pt"]
    assert list(tmp_path.iterdir()) == [folder]


def a_file(folder: Path) -> Path:
    (folder / "out").write_text("mine")
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "deeper"


def too_long(folder: Path) -> Path:
    return folder / ("n" * 300)


def of_the_kernel(folder: Path) -> Path:
    return Path("/proc/dnifx")


@pytest.mark.parametrize("name", [a_file, below_a_file, too_long, of_the_kernel])
@pytest.mark.parametrize("recipe", ["fcn", "copy", "two-clocks", "delayed-cue"])
def test_out_that_cannot_be_written_to_is_found_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: Callable[[Path], Path], recipe: str
) -> None:
    out = name(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["train", recipe, "--out", str(out)])
    shown = capsys.readouterr()
    assert left.value.code == 2
    assert not shown.out
    assert len(shown.err.splitlines()) == 1
    assert "--out" in shown.err
    assert "name a folder" in shown.err
    assert all(each.read_text() == "mine" for each in tmp_path.iterdir())


def limited(size: int, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose files may not grow beyond a size, as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit, check=False)


def test_a_disk_that_is_full_in_the_middle_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path)
    kept.save(STATE)
    before = kept.path.read_bytes()
    done = limited(
        100_000,
        "from pathlib import Path\nimport torch\nfrom dnifx.errors import OptionError\n"
        "from dnifx.zoo.recipes.store import Checkpoint\n"
        f"try:\n    Checkpoint(Path({str(kept.path)!r}), {{'lr': 0.1}}).save({{'w': torch.zeros(10**6)}})\n"
        "except OptionError as error:\n    print(error)",
    )
    assert "cannot be written" in done.stdout, done.stderr
    assert "What was there before is whole" in done.stdout
    assert kept.path.read_bytes() == before
    assert list(kept.path.parent.iterdir()) == [kept.path]


def test_a_disk_that_is_full_at_the_start_is_found_there(tmp_path: Path) -> None:
    code = f"from dnifx.cli import main\nmain({['train', 'fcn', *BRIEF, '--out', str(tmp_path / 'out')]!r})"
    done = limited(1000, code)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "--out" in done.stderr
    assert list(tmp_path.rglob("*.*")) == []


def test_everything_is_on_the_disk_before_it_bears_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    sync, replace = os.fsync, Path.replace

    def sync_and_tell(file: int) -> None:
        told.append(os.readlink(f"/proc/self/fd/{file}"))
        sync(file)

    def replace_and_tell(own: Path, new: Path) -> Path:
        told.append(f"{own} -> {new}")
        return replace(own, new)

    monkeypatch.setattr(os, "fsync", sync_and_tell)
    monkeypatch.setattr(Path, "replace", replace_and_tell)
    kept = checkpoint(tmp_path)
    kept.save({"step": 1})
    kept.save({"step": 2})
    part, path, folder = kept.path.with_name(f".run.pt.{os.getpid()}.part"), kept.path, kept.path.parent
    moved = [str(part), f"{part} -> {path}", str(folder)]
    assert told == [*moved, str(part), f"{path} -> {kept.previous}", *moved[1:]]


def test_what_cannot_be_prepared_says_why() -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        prepare(Path("/proc/nowhere"))
    prepare(None)
