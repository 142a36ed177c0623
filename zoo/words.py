"""Text as numbered symbols in windows, for language models: characters, or words of any text file."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnifx.errors import DataError
from dnifx.zoo.charlm import Text

UNKNOWN = "<unk>"
"""The word that stands for all words outside the vocabulary."""

_WORD = re.compile(r"\w+|[^\w\s]|\n")


def read_words(path: Path, vocabulary: int) -> Text:
    """Return a text file by words: 90% to train on, 5% to validate, 5% to test.

    Words are runs of letters and digits, single other signs, and ends of lines. The vocabulary holds the
    most frequent words of the training part; all others are one word.

    Args:
        path: A file of UTF-8 text.
        vocabulary: Words at most, the unknown word included.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        words = _WORD.findall(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a file of UTF-8 text") from error
    return numbered(words, vocabulary)


def numbered(words: Sequence[str], vocabulary: int) -> Text:
    """Return words as numbers: 90% to train on, 5% to validate, 5% to test.

    >>> text = numbered("a b a c a b a d a b".split() * 2, vocabulary=3)
    >>> text.characters, text.test.tolist()
    (('<unk>', 'a', 'b'), [2])
    """
    ends = len(words) * 90 // 100, len(words) * 95 // 100
    known = (UNKNOWN, *(word for word, _ in Counter(words[: ends[0]]).most_common(vocabulary - 1)))
    numbers = {word: number for number, word in enumerate(known)}
    everything = torch.tensor([numbers.get(word, 0) for word in words], dtype=torch.int64)
    return Text(known, everything[: ends[0]], everything[ends[0] : ends[1]], everything[ends[1] :])


class Windows:
    """Windows from random places of a text. The places depend on the seed alone.

    Args:
        text: Symbols [length].
        batch: Windows in a batch.
        length: Symbols in a window.
        seed: Seed of the places.

    Raises:
        DataError: The text is shorter than a window and the symbol that follows.
    """

    def __init__(self, text: Tensor, batch: int, length: int, seed: int) -> None:
        if len(text) <= length:
            raise DataError(
                f"a text of {len(text)} symbols is too short for windows of {length}; give a lower --length"
            )
        self.text, self.batch, self.length = text, batch, length
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Return symbols [batch, length], and for each the symbol that follows."""
        starts = torch.randint(len(self.text) - self.length, (self.batch, 1), generator=self.generator)
        read = self.text[starts + torch.arange(self.length + 1)]
        return read[:, :-1], read[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""
        self.generator.set_state(state["generator"])


def rows_of(text: Tensor, length: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a text in windows, up to ``batch`` at a time, each with the symbols that follow.

    Args:
        text: Symbols [length]. What is left beyond the last whole window is not read.
        length: Symbols in a window.
        batch: Windows at a time.

    Raises:
        DataError: The text is shorter than a window and the symbol that follows.
    """
    count = (len(text) - 1) // length
    if not count:
        raise DataError(f"a text of {len(text)} symbols is too short for windows of {length}; give a lower --length")
    inputs, targets = text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length)
    yield from zip(torch.split(inputs, batch), torch.split(targets, batch), strict=True)
