"""The models of the zoo, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from dnifx import Recurrent
from dnifx.zoo.cnn import CNN
from dnifx.zoo.fcn import FCN
from dnifx.zoo.language_model import LanguageModel
from dnifx.zoo.resnet import ResNet
from dnifx.zoo.two_clocks import TwoClocks, zero_state
from dnifx.zoo.vit import ViT

Built = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class ZooModel:
    """A model with a name.

    Attributes:
        name: The name, such as ``fcn``.
        summary: One line for lists.
        factory: Builds the model and example arguments to call it with. It takes the sizes
            (``layers``, ``width`` or ``filters``) as keyword arguments.
        cuts: The default cuts, as ``decouple`` takes them.
        classes: Number of classes of its output, for a label context.
        every: After how many windows each slow part runs, by module path; empty if all parts run in
            every window.
    """

    name: str
    summary: str
    factory: Callable[..., Built]
    cuts: str | int | tuple[str | Recurrent, ...]
    classes: int = 10
    every: Mapping[str, int] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The cuts and rates as a command line writes them."""
        cuts = ", ".join(map(str, self.cuts)) if isinstance(self.cuts, tuple) else str(self.cuts)
        return "; every ".join([cuts, *(f"{name}={windows}" for name, windows in self.every.items())])


def _fcn_mnist(layers: int = 4, width: int = 256) -> Built:
    return FCN(784, layers=layers, width=width), (torch.zeros(32, 784),)


def _fcn_cifar10(layers: int = 5, width: int = 1000) -> Built:
    return FCN(3072, layers=layers, width=width), (torch.zeros(32, 3072),)


def _cnn_mnist(layers: int = 3, filters: int = 64) -> Built:
    return CNN((1, 28, 28), layers=layers, filters=filters), (torch.zeros(32, 1, 28, 28),)


def _cnn_cifar10(layers: int = 3, filters: int = 128) -> Built:
    return CNN((3, 32, 32), layers=layers, filters=filters), (torch.zeros(32, 3, 32, 32),)


def _resnet(layers: int = 3, filters: int = 16) -> Built:
    return ResNet(blocks=layers, filters=filters), (torch.zeros(32, 3, 32, 32),)


def _vit(layers: int = 6, width: int = 64) -> Built:
    return ViT(layers=layers, width=width), (torch.zeros(32, 3, 32, 32),)


def _language_model(layers: int = 4, width: int = 64, symbols: int = 65, tied: bool = False) -> Built:
    return LanguageModel(symbols, layers, width, tied=tied), (torch.zeros(32, 64, dtype=torch.int64),)


def _two_clocks(width: int = 256, ticks: int = 4, batch: int = 32) -> Built:
    digits, states = torch.zeros(ticks, batch, 784), [zero_state(batch, width) for _ in range(2)]
    return TwoClocks(width=width, ticks=ticks), (digits, *states)


_ALL = (
    ZooModel("fcn", "The fully connected network for MNIST, 4 layers of 256 units.", _fcn_mnist, "hidden.*"),
    ZooModel("cnn", "The convolutional network for MNIST, 3 layers of 64 filters.", _cnn_mnist, "hidden.*"),
    ZooModel(
        "fcn-cifar10", "The fully connected network for CIFAR-10, 5 layers of 1000 units.", _fcn_cifar10, "hidden.*"
    ),
    ZooModel(
        "cnn-cifar10", "The convolutional network for CIFAR-10, 3 layers of 128 filters.", _cnn_cifar10, "hidden.*"
    ),
    ZooModel(
        "resnet",
        "A residual network for CIFAR-10, 3 stages of 16, 32 and 64 filters.",
        _resnet,
        ("stages.0", "stages.1"),
    ),
    ZooModel("vit", "A small vision transformer, 6 blocks of 64 features.", _vit, ("blocks.1", "blocks.3")),
    ZooModel("lm", "A causal language model, 4 blocks of 64 features.", _language_model, ("blocks.1",), classes=65),
    ZooModel(
        "two-clocks",
        "Two networks that tick at different rates, with a message every 4 digits.",
        _two_clocks,
        ("fast", Recurrent("fast_state", "2"), Recurrent("slow_state", "3")),
        classes=5,
        every={"slow": 4},
    ),
)

MODELS: Mapping[str, ZooModel] = MappingProxyType({model.name: model for model in _ALL})
"""Every model of the zoo by its name."""
