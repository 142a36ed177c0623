"""Messages between two ranks: tensors of any shape as bytes, sent without waiting and received ahead of time.

gloo sends data only once the receiver has asked for it, which takes the time of a round trip. So a receiver asks for several
messages in advance. It does not know their sizes then: all pieces have the size of the first message at most, and a longer
message takes several.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dnifx.errors import RankError

Group = dist.ProcessGroup
Label = tuple[int, int, int]
"""Which message it is: the number of a partition or a boundary, the step, and how often the run was restarted."""

ALIGNMENT = 64
HEAD = 16
"""Bytes before the description: its length, and that of the whole message."""


class Lost(RankError):
    """The connection to a rank was closed, or the rank said nothing for too long."""

    def __init__(self, peer: int, why: str) -> None:
        super().__init__(why)
        self.peer = peer


def waited(work: Any, peer: int) -> None:
    """Wait for a transfer.

    Raises:
        Lost: It failed.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise Lost(peer, str(error).split("\n")[0].partition("] ")[2] or str(error)) from error


DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
PLAIN = (bool, int, float, str)


class Sparse(NamedTuple):
    """Stands before the indices and the values of a sparse tensor in a message."""

    shape: list[int]
    coalesced: bool


def flattened(values: Sequence[Any]) -> Iterator[Any]:
    """Take sparse tensors apart."""
    for value in values:
        if isinstance(value, Tensor) and value.layout is torch.sparse_coo:
            yield from (Sparse([*value.shape], value.is_coalesced()), value._indices(), value._values())
        else:
            yield value


def packed(label: Label, values: Sequence[Any]) -> Tensor:
    """Return a message as bytes.

    Args:
        label: Which message it is.
        values: Tensors, plain values or None.

    Raises:
        RankError: A value is something else.
    """
    tensors: list[Tensor] = []
    parts: list[Any] = []
    for value in flattened(values):
        if isinstance(value, Sparse):
            parts.append([*value])
        elif isinstance(value, Tensor):
            strides = value.stride()
            order = sorted(range(value.dim()), key=[-each for each in strides].__getitem__)
            tensors.append(value.detach().permute(order).contiguous().cpu())
            parts.append([str(value.dtype), list(tensors[-1].shape), order])
        elif value is None or isinstance(value, PLAIN):
            parts.append([value])
        else:
            raise RankError(
                f"a value of type {type(value).__name__} would cross from rank to rank; only tensors, numbers and text can. Cut elsewhere, "
                "or keep both partitions on one rank"
            )
    text = json.dumps([label, parts]).encode()
    start = aligned(HEAD + len(text))
    sizes = [aligned(each.numel() * each.element_size()) for each in tensors]
    whole = torch.empty(start + sum(sizes), dtype=torch.uint8)
    whole[:HEAD].view(torch.int64).copy_(torch.tensor([len(text), len(whole)]))
    whole[HEAD : HEAD + len(text)].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for each, size in zip(tensors, sizes, strict=True):
        own = each.numel() * each.element_size()
        if own:
            whole[start : start + own].view(each.dtype).view(each.shape).copy_(each)
        start += size
    return whole


def unpacked(whole: Tensor) -> tuple[Label, tuple[Any, ...]]:
    """Return the label and the values of a message; its tensors lie in the memory of the message."""
    count = int(whole[:HEAD].view(torch.int64)[0])
    label, parts = json.loads(bytes(whole[HEAD : HEAD + count].tolist()))
    start, values = aligned(HEAD + count), list[Any]()
    for part in parts:
        if len(part) < 3:
            values.append(part[0] if len(part) == 1 else Sparse(*part))
            continue
        dtype, shape, order = DTYPES[part[0]], part[1], part[2]
        own = torch.Size(shape).numel() * dtype.itemsize
        flat = whole[start : start + own].view(dtype) if own else torch.empty(0, dtype=dtype)
        values.append(flat.view(shape).permute([order.index(dim) for dim in range(len(order))]))
        start += aligned(own)
    return (label[0], label[1], label[2]), tuple(whole_values(iter(values)))


def whole_values(parts: Iterator[Any]) -> Iterator[Any]:
    """Put sparse tensors together again."""
    for each in parts:
        if isinstance(each, Sparse):
            shape, known = each.shape, each.coalesced
            yield torch.sparse_coo_tensor(next(parts), next(parts), shape, is_coalesced=known, check_invariants=False)
        else:
            yield each


def aligned(count: int) -> int:
    """Return a number of bytes, rounded up so that tensors of any dtype may follow."""
    return -(-count // ALIGNMENT) * ALIGNMENT


class Sender:
    """Sends messages to one rank, and never waits for the receiver while few are under way.

    Args:
        group: The process group of this direction.
        peer: The receiver.
        tag: What tells these messages from others of the group.
    """

    def __init__(self, group: Group, peer: int, tag: int) -> None:
        self.group, self.peer, self.tag, self.size = group, peer, tag, 0
        self._under_way: deque[tuple[Label, Any, Tensor]] = deque()

    def send(self, label: Label, values: Sequence[Any]) -> None:
        """Send a message. The first one tells the receiver how long the pieces are."""
        whole = packed(label, values)
        if not self.size:
            self.size = len(whole)
            self._start(label, torch.tensor([self.size]))
        for piece in torch.split(whole, self.size):
            self._start(label, piece)

    def _start(self, label: Label, piece: Tensor) -> None:
        try:
            self._under_way.append((label, dist.isend(piece, self.peer, self.group, self.tag), piece))
        except RuntimeError as error:
            raise Lost(self.peer, str(error)) from error

    def settle(self, step: int, epoch: int) -> None:
        """Wait until the messages of steps before ``step`` have left, so that not too many are held.

        Those from before the last restart left before them; nobody asks for them sooner.

        Raises:
            Lost: The receiver is gone.
        """
        while next((found < step for (_, found, of), *_ in self._under_way if of == epoch), False):
            waited(self._under_way[0][1], self.peer)
            self._under_way.popleft()


class Receiver:
    """Receives messages of one rank, in any order of their labels.

    Args:
        group: The process group of this direction.
        peer: The sender.
        tag: What tells these messages from others of the group.
        ahead: How many pieces are asked for in advance.
    """

    def __init__(self, group: Group, peer: int, tag: int, ahead: int) -> None:
        self.group, self.peer, self.tag, self.ahead, self.size = group, peer, tag, ahead, 0
        self._asked: deque[tuple[Any, Tensor]] = deque()
        self._early: dict[Label, tuple[Any, ...]] = {}

    def receive(self, label: Label) -> tuple[Any, ...]:
        """Wait for a message. Others that come before it are kept until they are asked for.

        Raises:
            Lost: The sender is gone.
        """
        while label not in self._early:
            found, values = unpacked(self._whole())
            self._early[found] = values
        return self._early.pop(label)

    def forget(self, epoch: int, step: int) -> None:
        """Drop messages that nobody will ask for: from before the last restart, or from steps before ``step``."""
        self._early = {label: each for label, each in self._early.items() if label[2] >= epoch and label[1] >= step}

    def _whole(self) -> Tensor:
        """Wait for the next message, piece by piece."""
        if not self.size:
            size = torch.zeros(1, dtype=torch.int64)
            self._ask(size)
            self._next()
            self.size = int(size)
        pieces = [self._next()]
        total = int(pieces[0][:HEAD].view(torch.int64)[1])
        while len(pieces) * self.size < total:
            pieces.append(self._next())
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:total]

    def _next(self) -> Tensor:
        while self.size and len(self._asked) <= self.ahead:
            self._ask(torch.empty(self.size, dtype=torch.uint8))
        work, buffer = self._asked.popleft()
        waited(work, self.peer)
        return buffer

    def _ask(self, buffer: Tensor) -> None:
        try:
            self._asked.append((dist.irecv(buffer, self.peer, self.group, self.tag), buffer))
        except RuntimeError as error:
            raise Lost(self.peer, str(error)) from error
