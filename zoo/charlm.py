"""Text as characters, for language models that read it in endless windows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dnifx.errors import DataError
from dnifx.zoo.files import Resource, find

SHAKESPEARE = Resource(
    "tinyshakespeare/input.txt",
    "6fb458f1232090904fb40fe944165e91",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
)


@dataclass(frozen=True)
class Text:
    """Three parts of a text, with every character as a number.

    Attributes:
        characters: The alphabet: all characters of the three parts.
        train: Characters [length], int64.
        validation: Likewise.
        test: Likewise.
    """

    characters: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor


def tiny_shakespeare() -> Text:
    """Return tiny Shakespeare: 90% to train on, 5% to validate, 5% to test.

    Raises:
        DataError: The file is damaged, or it is missing and cannot be downloaded.
    """
    content = find(SHAKESPEARE).read_text(encoding="utf-8")
    ends = len(content) * 90 // 100, len(content) * 95 // 100
    return encoded(content[: ends[0]], content[ends[0] : ends[1]], content[ends[1] :])


def read_text(paths: Sequence[Path]) -> Text:
    """Return the text of three files: train, validation, test.

    The character files of Penn Treebank can be read as they are.

    Raises:
        DataError: There are not three files, or one cannot be read.
    """
    if len(paths) != 3:
        raise DataError(f"got {len(paths)} text files, expected three: train, validation, test")
    try:
        return encoded(*(path.read_text(encoding="utf-8") for path in paths))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a text cannot be read: {error}; give three files of UTF-8 text") from error


def encoded(train: str, validation: str, test: str) -> Text:
    """Return three parts of a text with their characters as numbers."""
    characters = tuple(sorted(set(train) | set(validation) | set(test)))
    numbers = {character: number for number, character in enumerate(characters)}
    parts = (torch.tensor([numbers[character] for character in part]) for part in (train, validation, test))
    return Text(characters, *parts)


class TextStream:
    """Streams that start at evenly spaced places of a text and read it round and round.

    Args:
        text: Characters [length].
        batch: Number of streams.

    Raises:
        DataError: The text has fewer than two characters for each stream.

    >>> stream = TextStream(torch.arange(8), batch=2)
    >>> [part.tolist() for part in stream.window(3)]
    [[[0, 1, 2], [4, 5, 6]], [[1, 2, 3], [5, 6, 7]]]
    """

    def __init__(self, text: Tensor, batch: int) -> None:
        if len(text) < 2 * batch:
            raise DataError(
                f"a text of {len(text)} characters is too short for {batch} streams; give fewer with --batch"
            )
        self.text = text
        self.starts = torch.arange(batch) * (len(text) // batch)
        self.place = 0

    def window(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return the next characters [batch, steps], and for each the character that follows."""
        places = (self.starts[:, None] + self.place + torch.arange(steps + 1)) % len(self.text)
        self.place = (self.place + steps) % len(self.text)
        read = self.text[places]
        return read[:, :-1], read[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the text."""
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""
        self.place = state["place"]


def bits_per_character(model: nn.Module, text: Tensor, width: int, streams: int = 32, steps: int = 200) -> float:
    """Return the mean number of bits that a model needs for a character of a text.

    Parallel streams read the text, each from a zero state.

    Args:
        model: Maps characters [batch, steps] and a state to logits and the next state.
        text: Characters [length].
        width: Units of the state.
        streams: Number of parallel streams. The text is cut into as many parts.
        steps: Characters in a window.
    """
    part = (len(text) - 1) // streams
    rows = torch.stack([text[start : start + part + 1] for start in range(0, streams * part, part)])
    zero = torch.zeros(1, streams, width)
    state: Any = (zero, zero)
    total = 0.0
    with torch.no_grad():
        for x, y in windows_of(rows, steps):
            logits, state = model(x, state)
            total += float(functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    return total / (streams * part) / math.log(2)


def windows_of(rows: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows of the rows, and for each character the one that follows."""
    for start in range(0, rows.size(1) - 1, steps):
        stop = min(start + steps, rows.size(1) - 1)
        yield rows[:, start:stop], rows[:, start + 1 : stop + 1]
