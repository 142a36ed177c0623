"""Endless shuffled batches whose place can be saved and restored."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dnifx.errors import DataError
from dnifx.zoo.data import Split


class Batches:
    """Batches of one split. Each pass has another order and drops an incomplete last batch.

    The order depends on the seed alone, not on the device or on other random numbers.

    Args:
        split: The examples.
        size: Examples in a batch.
        seed: Seed of the orders.

    Raises:
        DataError: The split holds less than a batch.

    >>> split = Split(torch.arange(5.0)[:, None], torch.arange(5))
    >>> batches = Batches(split, size=2, seed=0)
    >>> [batches.next()[1].tolist() for _ in range(3)]
    [[4, 0], [1, 3], [3, 4]]
    """

    def __init__(self, split: Split, size: int, seed: int) -> None:
        if not 1 <= size <= len(split):
            raise DataError(f"Batches(): got {size=}, expected from 1 to the {len(split)} examples of the split")
        self._split = split
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._order = self._shuffle()
        self._position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the inputs [size, ...] and the classes [size] of the next batch."""
        if self._position + self._size > len(self._split):
            self._order = self._shuffle()
            self._position = 0
        chosen = self._order[self._position : self._position + self._size].to(self._split.targets.device)
        self._position += self._size
        batch = self._split.take(chosen)
        return batch.inputs, batch.targets

    def state_dict(self) -> dict[str, Any]:
        """Return the place: the generator's state, the order of this pass, the position in it."""
        return {"generator": self._generator.get_state(), "order": self._order, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            DataError: The state belongs to another number of examples.
        """
        if len(state["order"]) != len(self._split):
            raise DataError(
                f"the saved order is that of {len(state['order'])} examples, but the split holds {len(self._split)}; "
                "use the split that the state was saved with"
            )
        self._generator.set_state(state["generator"])
        self._order = state["order"]
        self._position = state["position"]

    def _shuffle(self) -> Tensor:
        return torch.randperm(len(self._split), generator=self._generator)
