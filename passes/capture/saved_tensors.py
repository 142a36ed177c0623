"""What a forward pass keeps for its backward pass, held to a number of bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dnifx.passes.capture.record.state import storage_of


class NotKept(RuntimeError):
    """A backward pass needs what a forward pass did not keep."""


class Kept:
    """What a forward pass keeps for the backward pass: all of it up to a number of bytes, and beyond that nothing more.

    Args:
        most: The number of bytes; None for any.

    Attributes:
        is_whole: Whether all was kept.
    """

    def __init__(self, most: int | None) -> None:
        self.is_whole = most is None or most > 0
        self._most = most
        self._held: list[Tensor] = []
        self._seen: set[int] = set()
        self._bytes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a forward pass, and the backward pass if all was kept."""
        if self._most is None:
            yield
            return
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._held.clear()

    def _pack(self, tensor: Tensor) -> int:
        """Hold a tensor, and let all go where that is too much; return its number."""
        if self.is_whole:
            self._held.append(tensor)
            place = storage_of(tensor)
            self._bytes += 0 if place in self._seen else tensor.nbytes
            self._seen.add(place)
            self.is_whole = self._bytes <= (self._most or 0)
        if not self.is_whole:
            self._held.clear()
        return len(self._held) - 1

    def _unpack(self, number: int) -> Tensor:
        if not self.is_whole:
            raise NotKept("forward differentiates by itself what was not kept")
        return self._held[number]


def needs_what_is_kept(error: Exception) -> bool:
    """Whether a forward pass failed since it differentiates by itself, or takes no hooks on saved tensors."""
    return isinstance(error, NotKept) or "saved tensor hooks" in str(error)
