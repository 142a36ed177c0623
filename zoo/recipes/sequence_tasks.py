"""The tasks of the sequence recipes: copying, and predicting the next character of a text."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from dnifx.zoo.charlm import Text, TextStream, bits_per_character
from dnifx.zoo.copy_task import CopyStream
from dnifx.zoo.sequence import SequenceNetwork


class Task(Protocol):
    """A task to train a network on."""

    better: int
    """1 if a higher score is better, -1 if a lower one is."""

    def network(self, width: int) -> nn.Module:
        """Return a fresh network."""

    def window(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return the next inputs and classes."""

    def learned(self, logits: Tensor, targets: Tensor) -> None:
        """Receive the network's answers in a window."""

    def score(self, model: nn.Module, width: int) -> float:
        """Return the score for the curve."""

    def final(self, model: nn.Module, width: int) -> float:
        """Return the score for the table."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""


class CopyTask(CopyStream):
    """Copying. The score is the length of the longest solved task."""

    better = 1

    def network(self, width: int) -> nn.Module:
        """Return a fresh network."""
        return SequenceNetwork(self.inputs, width, self.outputs)

    def score(self, model: nn.Module, width: int) -> float:
        """Return the length of the longest solved task, 0 before the first."""
        return float(self.solved)

    def final(self, model: nn.Module, width: int) -> float:
        """Return the length of the longest solved task."""
        return self.score(model, width)


class TextTask(TextStream):
    """Predicting the next character. The score is bits per character.

    The curve shows the score on the validation part, the table the score on the test part.
    """

    better = -1

    def __init__(self, text: Text, batch: int) -> None:
        super().__init__(text.train, batch)
        self.parts = text

    def network(self, width: int) -> nn.Module:
        """Return a fresh network."""
        count = len(self.parts.characters)
        return SequenceNetwork(count, width, count, embedded=True)

    def learned(self, logits: Tensor, targets: Tensor) -> None:
        """Do nothing: the score is measured on another part."""

    def score(self, model: nn.Module, width: int) -> float:
        """Return the bits per character of the validation part."""
        return bits_per_character(model, self.parts.validation, width)

    def final(self, model: nn.Module, width: int) -> float:
        """Return the bits per character of the test part."""
        return bits_per_character(model, self.parts.test, width)
