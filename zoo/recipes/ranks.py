"""A recipe over several processes: all train, the first one reads checkpoints, writes files and shows the progress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

import dnifx
from dnifx.errors import DnifxError

T = TypeVar("T")

ALONE = "--places ranks needs several processes: start them with torchrun --nproc-per-node=2 -m dnifx train ..."


class Saved(Protocol):
    """Where a run's state is saved."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state."""

    def load(self) -> Mapping[str, Any] | None:
        """Return the last state, or None."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        several: Whether they are those that torchrun started; else there is this one alone.
    """

    several: bool

    def join(self) -> None:
        """Join the others.

        Raises:
            PlaceError: torchrun did not start this process.
        """
        if self.several:
            dnifx.join_ranks(ALONE)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads, writes and shows."""
        return not self.several or dist.get_rank() == 0

    def told(self, make: Callable[[], T]) -> T:
        """Let the first process make a value; return it, or raise the error that making it raised, in all."""
        if not self.several:
            return make()
        shared: list[Any] = [None, None]
        if self.is_first:
            try:
                shared[0] = make()
            except DnifxError as error:
                shared[1] = error
        dist.broadcast_object_list(shared, 0)
        if shared[1] is not None:
            raise shared[1]
        made: T = shared[0]
        return made

    def shared(self, checkpoint: Saved | None) -> Saved | None:
        """Return a checkpoint that the first process writes and reads for all."""
        return checkpoint if checkpoint is None or not self.several else SharedCheckpoint(checkpoint, self)


@dataclass(frozen=True)
class SharedCheckpoint:
    """A checkpoint of several processes.

    Attributes:
        own: The file, which the first process alone has to see.
        processes: The processes of the run.
    """

    own: Saved
    processes: Processes

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state, which is the same in all processes."""
        self.processes.told(lambda: self.own.save(state))

    def load(self) -> Mapping[str, Any] | None:
        """Return the last state, or None, in all processes."""
        return self.processes.told(self.own.load)
