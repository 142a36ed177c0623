"""The data sets of the paper's experiments as tensors: train, validation and test."""

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from dnifx.errors import DataError, nearest
from dnifx.zoo.files import Resource, find

SPLIT_SEED = 20170806
"""Seed that draws the validation examples, and the digits' test examples, alike in every run."""

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Examples of one data set.

    Attributes:
        inputs: Images [examples, channels, height, width] or vectors [examples, size]; float32
            in [0, 1].
        targets: Classes [examples], int64.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def flat(self) -> "Split":
        """Return the same examples with each input as one vector."""
        return Split(self.inputs.flatten(1), self.targets)

    def to(self, device: torch.device | str) -> "Split":
        """Return the same examples on another device."""
        return Split(self.inputs.to(device), self.targets.to(device))

    def take(self, indices: Tensor) -> "Split":
        """Return the examples at ``indices`` [count], in that order."""
        return Split(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True)
class Dataset:
    """A data set with a name.

    Attributes:
        name: The name, such as ``mnist``.
        summary: One line for lists.
        shape: Shape of one image, [channels, height, width].
        classes: Number of classes.
        validation: Training examples held out for validation by default.
        train: Reads the training examples, including those for validation.
        test: Reads the test examples.
    """

    name: str
    summary: str
    shape: tuple[int, int, int]
    classes: int
    validation: int
    train: Callable[[], Split]
    test: Callable[[], Split]


def load(name: str, split: str = "train", *, validation: int | None = None) -> Split:
    """Return one split of a data set.

    The files are in ``$DNIFX_DATA``, or in ``~/.cache/dnifx``. Missing files are downloaded, and
    every file is checked when it is read. A fixed seed draws the validation examples from the
    training examples.

    Args:
        name: ``digits``, ``mnist``, ``fashion`` or ``cifar10``.
        split: ``train``, ``validation`` or ``test``.
        validation: Training examples held out for validation; by default the number in
            ``DATASETS``.

    Raises:
        DataError: The name or the split is unknown, a file is damaged, or a missing file cannot be
            downloaded.
    """
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}; did you mean {nearest(name, DATASETS)}?")
    if split not in SPLITS:
        raise DataError(f"load({name!r}): got split={split!r}, expected one of {', '.join(SPLITS)}")
    dataset = DATASETS[name]
    if split == "test":
        return dataset.test()
    held_out = dataset.validation if validation is None else validation
    return _held_out(dataset.train(), held_out)[split == "validation"]


def _held_out(examples: Split, count: int) -> tuple[Split, Split]:
    if not 0 <= count < len(examples):
        raise DataError(
            f"got validation={count}, expected fewer than the {len(examples)} training examples, and 0 or more"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return examples.take(order[count:].sort().values), examples.take(order[:count].sort().values)


def _digits(*, test: bool) -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'dnifx[zoo]'"
        ) from error
    images, classes = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().div(16).reshape(-1, 1, 8, 8)
    return _held_out(Split(inputs, torch.from_numpy(classes).long()), 360)[test]


def _idx(images: Resource, labels: Resource) -> Split:
    pixels, classes = _unpack(find(images), 16), _unpack(find(labels), 8)
    return _split(pixels.reshape(-1, 1, 28, 28), classes)


def _unpack(path: Path, header: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def _cifar(*batches: Resource) -> Split:
    rows = np.concatenate([np.fromfile(find(batch), np.uint8) for batch in batches]).reshape(-1, 3073)
    return _split(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])


def _split(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], classes: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> Split:
    inputs = torch.from_numpy(pixels.astype(np.float32)).div_(255)
    return Split(inputs, torch.from_numpy(classes.astype(np.int64)))


def _idx_dataset(name: str, summary: str, url: str, hashes: Mapping[str, str]) -> Dataset:
    files = {file: Resource(f"{name}/{file}-ubyte.gz", md5, f"{url}/{file}-ubyte.gz") for file, md5 in hashes.items()}

    def train() -> Split:
        return _idx(files["train-images-idx3"], files["train-labels-idx1"])

    def test() -> Split:
        return _idx(files["t10k-images-idx3"], files["t10k-labels-idx1"])

    return Dataset(name, summary, (1, 28, 28), 10, 5000, train, test)


_MNIST = _idx_dataset(
    "mnist",
    "60,000 + 10,000 handwritten digits, 28 x 28",
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    {
        "train-images-idx3": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)

_FASHION = _idx_dataset(
    "fashion",
    "60,000 + 10,000 pictures of clothes, 28 x 28",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    {
        "train-images-idx3": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)

_CIFAR10_ARCHIVE = Resource(
    "cifar10/cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
)


def _cifar_batch(name: str, md5: str) -> Resource:
    return Resource(f"cifar10/cifar-10-batches-bin/{name}.bin", md5, archive=_CIFAR10_ARCHIVE)


_CIFAR10_TRAIN = (
    _cifar_batch("data_batch_1", "5dd7e06a14cb22eb9f671a540d1b7c25"),
    _cifar_batch("data_batch_2", "5ea93a67294ea407fff1d09f752e9692"),
    _cifar_batch("data_batch_3", "942cd6a4bcdd0dd3c604fbe906cb4421"),
    _cifar_batch("data_batch_4", "ae636b3ba5c66a11e91e8cb52e771fcb"),
    _cifar_batch("data_batch_5", "53f37980c15c3d472c316c40844f3f0d"),
)
_CIFAR10_TEST = _cifar_batch("test_batch", "803d5f7f4d78ea53de84dbe85f74fb6d")

_CIFAR10 = Dataset(
    "cifar10",
    "50,000 + 10,000 colour pictures of 10 classes, 32 x 32",
    (3, 32, 32),
    10,
    5000,
    lambda: _cifar(*_CIFAR10_TRAIN),
    lambda: _cifar(_CIFAR10_TEST),
)

_DIGITS = Dataset(
    "digits",
    "1,437 + 360 handwritten digits, 8 x 8; comes with scikit-learn, no network needed",
    (1, 8, 8),
    10,
    180,
    lambda: _digits(test=False),
    lambda: _digits(test=True),
)

DATASETS: Mapping[str, Dataset] = MappingProxyType({one.name: one for one in (_DIGITS, _MNIST, _FASHION, _CIFAR10)})
"""Every data set by its name."""
