"""What the models of the recipe ``table`` learn: to classify images, or to predict the next symbol of a text."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dnifx.zoo.batches import Batches
from dnifx.zoo.charlm import Text, encoded, tiny_shakespeare
from dnifx.zoo.cnn import CNN
from dnifx.zoo.data import DATASETS, Split, load
from dnifx.zoo.excerpt import SOLILOQUY
from dnifx.zoo.fcn import FCN
from dnifx.zoo.language_model import LanguageModel
from dnifx.zoo.recipes.table_options import Table
from dnifx.zoo.recipes.training import error_rate
from dnifx.zoo.resnet import ResNet
from dnifx.zoo.vit import ViT
from dnifx.zoo.words import Windows, read_words, rows_of


class Stream(Protocol):
    """Endless batches whose place can be saved."""

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""


class Task(ABC):
    """A data set, the networks that learn it, and how well they do.

    Attributes:
        unit: What ``score`` returns, in words; lower is better.
        relative: Whether scores are compared by their ratio, in percent, not by their difference.
        classes: Number of classes of a target.
    """

    unit: ClassVar[str]
    relative: ClassVar[bool]
    classes: int

    @abstractmethod
    def network(self) -> nn.Module:
        """Return a fresh network."""

    @abstractmethod
    def stream(self, seed: int) -> Stream:
        """Return the training batches."""

    @abstractmethod
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return a batch of the validation part."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss, a scalar."""

    @abstractmethod
    def score(self, model: nn.Module, part: str) -> float:
        """Return how well a model does on ``validation`` or ``test``, in evaluation mode."""


class Images(Task):
    """Classifies images. The score is the error in percent."""

    unit, relative = "error %", False

    def __init__(self, settings: Table) -> None:
        self.settings = settings
        self.dataset = DATASETS[str(settings.data)]
        self.classes = self.dataset.classes
        self.parts = {name: self._read(name) for name in ("train", "validation", "test")}

    def _read(self, name: str) -> Split:
        examples = load(str(self.settings.data), name)
        return examples.flat() if self.settings.model == "fcn" else examples

    def network(self) -> nn.Module:
        """Return a fresh network."""
        shape, layers, width = self.dataset.shape, self.settings.layers or 1, self.settings.width or 1
        match self.settings.model:
            case "resnet":
                return ResNet(shape, self.classes, layers, width)
            case "vit":
                return ViT(shape, self.classes, layers, width, self.settings.attention)
            case "cnn":
                return CNN(shape, self.classes, layers, width)
            case _:
                return FCN(torch.Size(shape).numel(), self.classes, layers, width)

    def stream(self, seed: int) -> Batches:
        """Return shuffled batches."""
        return Batches(self.parts["train"], self.settings.batch or 1, seed)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return a batch of the validation part."""
        part, size = self.parts["validation"], self.settings.batch or 1
        return part.inputs[:size], part.targets[:size]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy of logits [batch, classes]."""
        return functional.cross_entropy(output, target)

    def score(self, model: nn.Module, part: str) -> float:
        """Return the percentage of images that the model classifies wrongly."""
        return error_rate(model, self.parts[part])


class Symbols(Task):
    """Predicts the next character or word of a text. The score is the perplexity."""

    unit, relative = "perplexity", True

    def __init__(self, settings: Table) -> None:
        self.settings = settings
        self.text = _text(settings)
        self.classes = len(self.text.characters)

    def network(self) -> nn.Module:
        """Return a fresh language model."""
        own = self.settings
        return LanguageModel(self.classes, own.layers or 1, own.width or 1, own.attention, own.length, own.tied)

    def stream(self, seed: int) -> Windows:
        """Return windows from random places."""
        return Windows(self.text.train, self.settings.batch or 1, self.settings.length, seed)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return the first windows of the validation part."""
        return next(self._rows("validation", self.settings.batch or 1))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy of logits [batch, length, symbols]."""
        return functional.cross_entropy(output.flatten(0, 1), target.flatten())

    def score(self, model: nn.Module, part: str) -> float:
        """Return the perplexity: e to the mean cross entropy of a symbol."""
        was_training, total, count = model.training, 0.0, 0
        model.eval()
        with torch.no_grad():
            for inputs, targets in self._rows(part, 250):
                total += float(self.loss(model(inputs), targets)) * targets.numel()
                count += targets.numel()
        model.train(was_training)
        return math.exp(total / count)

    def _rows(self, part: str, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return rows_of(getattr(self.text, part), self.settings.length, batch)


def task_of(settings: Table) -> Task:
    """Return the task of complete options.

    Raises:
        DataError: The data set is not available.
    """
    return Symbols(settings) if settings.model == "lm" else Images(settings)


def _text(settings: Table) -> Text:
    if settings.text is not None:
        return read_words(settings.text, settings.vocabulary)
    if settings.data == "shakespeare":
        return tiny_shakespeare()
    ends = len(SOLILOQUY) * 80 // 100, len(SOLILOQUY) * 90 // 100
    return encoded(SOLILOQUY[: ends[0]], SOLILOQUY[ends[0] : ends[1]], SOLILOQUY[ends[1] :])
