"""Devices that are only pretended: every tensor has a place, and an operation on tensors of two places is an error.

All tensors lie on the CPU. So a run over pretended places has real numbers, and shows every value that nobody moved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dnifx.engines.devices import Devices, Mail
from dnifx.engines.places import Place
from dnifx.runtime.training.trainer import Trainer

HOME = -1
"""Where a batch is, before a place takes what it needs."""


class Pretended(TorchDispatchMode):
    """Lets the steps of a trainer run over places that are pretended.

    Args:
        trainer: The trainer; its engine runs over several places.

    Attributes:
        moves: The memory of each tensor that was moved, and where to, in this step.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        assert isinstance(trainer.engine, Devices)
        self.engine, self.here = trainer.engine, HOME
        self.places: dict[int, int] = {}
        self.moves: list[tuple[int, int]] = []
        self._alive: list[Tensor] = []  # or memory would be used again, by tensors of other places

    def tag(self, tensor: Tensor, place: int) -> None:
        """Say where a tensor is."""
        self._alive.append(tensor)
        self.places[memory(tensor)] = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        found = {self.places[memory(each)] for each in given if memory(each) in self.places}
        if len(found) > 1:
            raise AssertionError(f"{func} is given tensors of the places {sorted(found)}")
        made = func(*args, **(kwargs or {}))
        place = found.pop() if found else self.here
        for each in pytree.tree_leaves(made):
            if isinstance(each, Tensor) and memory(each) not in self.places:
                self.tag(each, place)
        return made

    def moved(self, start: Place, end: Place, values: tuple[Any, ...]) -> Mail:
        """Move values, as the engine does between devices."""
        number = self.engine.named.index(end)

        def copied(value: Tensor) -> Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                made = value.detach().clone()
            self.moves.append((memory(value), number))
            self._alive.append(value)
            self.tag(made, number)
            return made

        return pytree.tree_map_only(Tensor, copied, values), None

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Pretend during one step on a batch."""
        engine: Any = self.engine
        self.moves, self.here = [], HOME
        for tensor, *_ in engine._tensors.values():
            number = next(
                place for place, each in enumerate(engine.named) if each.device == engine._tensors[id(tensor)][1]
            )
            self.tag(tensor, number)
        for each in pytree.tree_leaves(batch):
            if isinstance(each, Tensor):
                self.tag(each, HOME)
        enter = engine.enter

        def entered(number: int) -> None:
            self.here = number
            enter(number)

        engine.enter, engine.moved = entered, self.moved
        try:
            with self:
                yield
        finally:
            del engine.enter, engine.moved
        assert len(set(self.moves)) == len(self.moves), "a tensor was moved twice to one place"


def memory(tensor: Tensor) -> int:
    """Tell the memory of a tensor."""
    return tensor.untyped_storage().data_ptr()
