"""The models of the zoo, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dnifx.zoo.cnn import CNN
from dnifx.zoo.fcn import FCN

Built = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class ZooModel:
    """A model that a name stands for.

    Attributes:
        name: What the user writes: ``fcn``.
        summary: One line for lists.
        factory: Builds the model and example arguments to call it with.
        cuts: The cuts that make sense by default, as ``decouple`` takes them.
        classes: Number of classes of its output, for a label context.
    """

    name: str
    summary: str
    factory: Callable[[], Built]
    cuts: str | int
    classes: int = 10


def _fcn_mnist() -> Built:
    return FCN(784, layers=4, width=256), (torch.zeros(32, 784),)


def _fcn_cifar10() -> Built:
    return FCN(3072, layers=5, width=1000), (torch.zeros(32, 3072),)


def _cnn_mnist() -> Built:
    return CNN((1, 28, 28), layers=3, filters=64), (torch.zeros(32, 1, 28, 28),)


def _cnn_cifar10() -> Built:
    return CNN((3, 32, 32), layers=3, filters=128), (torch.zeros(32, 3, 32, 32),)


_ALL = (
    ZooModel("fcn", "fully connected, 4 layers of 256, for MNIST", _fcn_mnist, "hidden.*"),
    ZooModel("cnn", "convolutional, 3 layers of 64 filters, for MNIST", _cnn_mnist, "hidden.*"),
    ZooModel("fcn-cifar10", "fully connected, 5 layers of 1000, for CIFAR-10", _fcn_cifar10, "hidden.*"),
    ZooModel("cnn-cifar10", "convolutional, 3 layers of 128 filters, for CIFAR-10", _cnn_cifar10, "hidden.*"),
)

MODELS: Mapping[str, ZooModel] = MappingProxyType({model.name: model for model in _ALL})
"""Every model of the zoo by its name."""
