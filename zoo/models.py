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
        factory: Builds the model and example arguments to call it with; takes the sizes (``layers``, ``width`` or
            ``filters``) as keyword arguments.
        cuts: The cuts that make sense by default, as ``decouple`` takes them.
        classes: Number of classes of its output, for a label context.
    """

    name: str
    summary: str
    factory: Callable[..., Built]
    cuts: str | int
    classes: int = 10


def _fcn_mnist(layers: int = 4, width: int = 256) -> Built:
    return FCN(784, layers=layers, width=width), (torch.zeros(32, 784),)


def _fcn_cifar10(layers: int = 5, width: int = 1000) -> Built:
    return FCN(3072, layers=layers, width=width), (torch.zeros(32, 3072),)


def _cnn_mnist(layers: int = 3, filters: int = 64) -> Built:
    return CNN((1, 28, 28), layers=layers, filters=filters), (torch.zeros(32, 1, 28, 28),)


def _cnn_cifar10(layers: int = 3, filters: int = 128) -> Built:
    return CNN((3, 32, 32), layers=layers, filters=filters), (torch.zeros(32, 3, 32, 32),)


_ALL = (
    ZooModel("fcn", "the fully connected network for MNIST, 4 layers of 256 units", _fcn_mnist, "hidden.*"),
    ZooModel("cnn", "the convolutional network for MNIST, 3 layers of 64 filters", _cnn_mnist, "hidden.*"),
    ZooModel(
        "fcn-cifar10", "the fully connected network for CIFAR-10, 5 layers of 1000 units", _fcn_cifar10, "hidden.*"
    ),
    ZooModel(
        "cnn-cifar10", "the convolutional network for CIFAR-10, 3 layers of 128 filters", _cnn_cifar10, "hidden.*"
    ),
)

MODELS: Mapping[str, ZooModel] = MappingProxyType({model.name: model for model in _ALL})
"""Every model of the zoo by its name."""
