"""Copy and Repeat Copy: endless episodes that grow longer once they are solved."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dnifx.errors import OptionError

SOLVED = 0.15
"""A length is solved if its error is below so many bits for each answered character."""


class CopyStream:
    """Parallel streams of episodes, read in windows of any length.

    In an episode the network first reads N characters, then a stop with the number of repeats R. It
    then answers with the N characters, R times, and a stop. While it reads, the answer is a blank.
    The error is the mean over the answer's characters and the last ``episodes`` episodes. Once it
    is below 0.15 bits, N grows by 1 (Copy), or N and R grow in turn (Repeat Copy).

    Args:
        repeat: Whether the sequence is repeated.
        batch: Number of streams.
        seed: Seed of the characters.
        characters: Size of the alphabet.
        episodes: Number of episodes that the error is averaged over.

    Raises:
        OptionError: The batch or the alphabet is too small.

    References:
        Jaderberg et al. 2017, appendix A.3: the length of a task is N + 3, or N R + 3.

    Differs from the paper in: the alphabet, the number of episodes averaged over and the coding of
    R, which the paper does not state.
    """

    def __init__(self, repeat: bool, batch: int, seed: int, characters: int = 2, episodes: int = 20) -> None:
        if batch < 1 or characters < 2 or episodes < 1:
            raise OptionError(f"CopyStream(): got {batch=}, {characters=}, {episodes=}; expected 1, 2 and 1 or more")
        self.repeat, self.batch, self.characters, self.episodes = repeat, batch, characters, episodes
        self.generator = torch.Generator().manual_seed(seed)
        self.length, self.repeats, self.solved = 1, 1, 0
        self.errors: list[float] = []
        self.answered: list[tuple[float, int]] = []
        self.place = 0
        self.start()

    @property
    def inputs(self) -> int:
        """Size of an input: the alphabet, the stop, the number of repeats."""
        return self.characters + 2

    @property
    def outputs(self) -> int:
        """Number of classes: the alphabet, the stop, the blank."""
        return self.characters + 2

    @property
    def task_length(self) -> int:
        """The present length, N R + 3."""
        return self.length * self.repeats + 3

    def start(self) -> None:
        """Draw the characters of an episode."""
        symbols = torch.randint(self.characters, (self.batch, self.length), generator=self.generator)
        stop, blank = self.characters, self.characters + 1
        steps = self.length + 1 + self.length * self.repeats + 1
        self.x = torch.zeros(self.batch, steps, self.inputs)
        self.x[:, : self.length, : self.characters] = functional.one_hot(symbols, self.characters).float()
        self.x[:, self.length, stop] = 1
        self.x[:, self.length, stop + 1] = self.repeats / 10
        self.y = torch.full((self.batch, steps), blank)
        self.y[:, self.length + 1 : -1] = symbols.repeat(1, self.repeats)
        self.y[:, -1] = stop
        self.place = 0

    def window(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return the next inputs [batch, steps, inputs] and classes [batch, steps].

        A window can reach into the next episode.
        """
        x, y = [], []
        while steps:
            if self.place == self.x.size(1):
                self.start()
            count = min(steps, self.x.size(1) - self.place)
            x.append(self.x[:, self.place : self.place + count])
            y.append(self.y[:, self.place : self.place + count])
            self.place += count
            steps -= count
        return torch.cat(x, 1), torch.cat(y, 1)

    def learned(self, logits: Tensor, targets: Tensor) -> None:
        """Add the error in a window, and make the task longer once it is solved.

        Args:
            logits: [batch, steps, outputs].
            targets: [batch, steps], from ``window``.
        """
        asked = targets[0] != self.characters + 1
        if not asked.any():
            return
        nats = functional.cross_entropy(
            logits.detach()[:, asked].flatten(0, 1).cpu(), targets[:, asked].flatten().cpu()
        )
        self.answered.append((float(nats) / math.log(2), int(asked.sum())))
        if self.place == self.x.size(1):
            total = sum(count for _, count in self.answered)
            self.errors.append(sum(bits * count for bits, count in self.answered) / total)
            self.errors = self.errors[-self.episodes :]
            self.answered = []
        if len(self.errors) == self.episodes and sum(self.errors) / self.episodes < SOLVED:
            self.grow()

    def grow(self) -> None:
        """Make the next episodes longer."""
        self.solved, self.errors = self.task_length, []
        if self.repeat and self.length > self.repeats:
            self.repeats += 1
        else:
            self.length += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the place: generator, lengths, errors and the present episode."""
        kept = ("length", "repeats", "solved", "errors", "answered", "place", "x", "y")
        return {"generator": self.generator.get_state(), **{name: getattr(self, name) for name in kept}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""
        for name, value in state.items():
            if name == "generator":
                self.generator.set_state(value)
            else:
                setattr(self, name, value)
