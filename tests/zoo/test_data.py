"""Data sets: what is read, how it is split, and what happens where files are absent or damaged."""

import gzip
import hashlib
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnifx.errors import DataError
from dnifx.zoo import data
from dnifx.zoo.batches import Batches
from dnifx.zoo.data import DATASETS, Split, load
from dnifx.zoo.files import Resource, data_folder, find

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DNIFX_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address where a server on this machine publishes it."""
    root = tmp_path / "site"
    root.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def test_digits_splits_are_disjoint_and_complete() -> None:
    splits = [load("digits", name) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [1257, 180, 360]
    everything = torch.cat([split.inputs for split in splits]).flatten(1)
    from sklearn.datasets import load_digits

    known = torch.from_numpy(load_digits().data).float() / 16
    assert sorted(everything.tolist()) == sorted(known.tolist())
    assert everything.min() == 0
    assert everything.max() == 1


def test_splits_are_the_same_every_time() -> None:
    first = load("digits", "validation")
    torch.manual_seed(1)
    second = load("digits", "validation")
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.targets, second.targets)


def test_inputs_keep_their_classes() -> None:
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    known = {tuple(image): int(label) for image, label in zip(images, classes, strict=True)}
    test = load("digits", "test").flat()
    found = [known[tuple((image * 16).tolist())] for image in test.inputs]
    assert found == test.targets.tolist()


def test_validation_size_is_chosen_from_train() -> None:
    assert len(load("digits", "train", validation=437)) == 1000
    assert len(load("digits", "validation", validation=437)) == 437
    with pytest.raises(DataError, match="validation=1437, expected fewer than the 1437"):
        load("digits", "train", validation=1437)


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(DataError, match="no data set 'minst'; did you mean 'mnist'"):
        load("minst")
    with pytest.raises(DataError, match="expected one of train, validation, test"):
        load("digits", "dev")


def test_idx_and_cifar_files_are_read_as_published(folder: Path) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8)
    images = gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + pixels.tobytes())
    labels = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 3]))
    rows = np.concatenate([np.array([[9], [4]], np.uint8), np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)], 1)
    folder.mkdir()
    for name, content in {"images": images, "labels": labels, "batch": rows.tobytes()}.items():
        (folder / name).write_bytes(content)
    digits = data._idx(Resource("images", md5(images)), Resource("labels", md5(labels)))
    assert digits.inputs.shape == (2, 1, 28, 28)
    assert digits.targets.tolist() == [7, 3]
    assert torch.equal((digits.inputs * 255).round().flatten(), torch.from_numpy(pixels).float())
    pictures = data._cifar(Resource("batch", md5(rows.tobytes())))
    assert pictures.inputs.shape == (2, 3, 32, 32)
    assert pictures.targets.tolist() == [9, 4]
    assert (pictures.inputs[1, 2, 31, 31] * 255).round() == rows[1, -1]


def test_data_folder_is_the_environments_or_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DNIFX_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.delenv("DNIFX_DATA")
    assert data_folder() == Path.home() / ".cache" / "dnifx"


def test_a_file_that_is_there_needs_no_network(folder: Path) -> None:
    folder.mkdir()
    (folder / "file").write_bytes(b"published")
    assert find(Resource("file", md5(b"published"), f"{NOWHERE}/file")) == folder / "file"


@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10"])
def test_a_damaged_file_is_named(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / (
        "cifar10/cifar-10-batches-bin/test_batch.bin" if name == "cifar10" else f"{name}/t10k-images-idx3-ubyte.gz"
    )
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    with pytest.raises(
        DataError, match=f"{path} is damaged: its md5 is {md5(b'damaged')}, expected .* remove the file"
    ):
        load(name, "test")
    assert path.read_bytes() == b"damaged"


def test_absent_and_offline_says_what_to_do(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a/file is missing and could not be downloaded .* connect .* DNIFX_DATA"):
        find(Resource("a/file", md5(b""), f"{NOWHERE}/file"))
    assert not (folder / "a/file").exists()


def test_an_absent_file_is_downloaded_once(
    folder: Path, site: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    root, address = site
    (root / "file").write_bytes(b"published" * 10_000)
    resource = Resource("set/file", md5(b"published" * 10_000), f"{address}/file")
    assert find(resource).read_bytes() == b"published" * 10_000
    (root / "file").unlink()
    assert find(resource) == folder / "set/file"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Downloading" not in printed.err


def test_a_wrong_download_is_refused(folder: Path, site: tuple[Path, str]) -> None:
    root, address = site
    (root / "file").write_bytes(b"another file")
    with pytest.raises(DataError, match=r"could not be downloaded .* hash"):
        find(Resource("file", md5(b"published"), f"{address}/file"))
    assert not (folder / "file").exists()


def test_a_member_comes_out_of_its_archive(folder: Path, site: tuple[Path, str], tmp_path: Path) -> None:
    root, address = site
    (tmp_path / "inside").write_bytes(b"inside")
    with tarfile.open(root / "all.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "inside", "batches/inside")
    whole = Resource("set/all.tar.gz", md5((root / "all.tar.gz").read_bytes()), f"{address}/all.tar.gz")
    assert find(Resource("set/batches/inside", md5(b"inside"), archive=whole)).read_bytes() == b"inside"
    with pytest.raises(DataError, match="holds no file batches/other"):
        find(Resource("set/batches/other", md5(b""), archive=whole))
    assert sorted(path.name for path in (folder / "set/batches").iterdir()) == ["inside"]


@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10"])
def test_published_sets_have_the_shape_they_say(name: str) -> None:
    if not (data_folder() / name).is_dir():
        pytest.skip(f"{data_folder() / name} is not there")
    dataset, test = DATASETS[name], load(name, "test")
    assert test.inputs.shape == (10_000, *dataset.shape)
    assert torch.bincount(test.targets).numel() == dataset.classes
    assert test.inputs.max() == 1


def count_to(size: int) -> Split:
    return Split(torch.arange(float(size))[:, None], torch.arange(size))


def test_batches_show_every_example_once_a_pass() -> None:
    batches = Batches(count_to(12), 4, seed=3)
    passes = [torch.cat([batches.next()[1] for _ in range(3)]).tolist() for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert passes[0] != passes[1]


def test_batches_depend_on_their_seed_alone() -> None:
    def drawn(seed: int, noise: Callable[[], Any]) -> list[list[int]]:
        batches = Batches(count_to(10), 3, seed)
        return [(noise(), batches.next()[1].tolist())[1] for _ in range(8)]

    assert drawn(1, lambda: None) == drawn(1, lambda: torch.rand(5))
    assert drawn(1, lambda: None) != drawn(2, lambda: None)


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_batches_go_on_from_a_saved_place(done: int) -> None:
    batches = Batches(count_to(10), 3, seed=0)
    for _ in range(done):
        batches.next()
    again = Batches(count_to(10), 3, seed=9)
    again.load_state_dict(batches.state_dict())
    for _ in range(8):
        ours, theirs = batches.next(), again.next()
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_batches_refuse_what_cannot_be() -> None:
    with pytest.raises(DataError, match="size=11, expected from 1 to the 10 examples"):
        Batches(count_to(10), 11, seed=0)
    with pytest.raises(DataError, match="order is that of 9 examples, but the split holds 10"):
        Batches(count_to(10), 3, seed=0).load_state_dict(Batches(count_to(9), 3, seed=0).state_dict())
