"""What a trainer asks of an engine, and the engine of a single process."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from dnifx.engines.stopping import Signals
from dnifx.ir import Program


class Engine(Protocol):
    """Carries values, gradients and results between the processes of a run.

    Attributes:
        rank: The number of this process.
        ranks: The rank of each partition; None where all are in this process.
        places: The number of each partition's place in this process; empty where all are in one.
        named: The places.
        home: The device where the model was before; None where it stayed there.
        captures: Whether steps are recorded once, and replayed.
        lag: Steps that a message may be late.
        process: The number of this process among those of all replicas.
    """

    places: tuple[int, ...]
    named: tuple[Any, ...]
    home: torch.device | None
    captures: bool
    process: int
    lag: int

    @property
    def group(self) -> Any:
        """The process group of all ranks of all replicas; None where there are none."""

    @property
    def replica(self) -> int:
        """The number of this replica of the net, where several train on shares of a batch."""

    @property
    def replicas(self) -> int:
        """How many replicas there are."""

    def total(self, tensor: Tensor) -> int:
        """Add a tensor up over the replicas, in place, and return how many there are."""

    def agreed(self, own: Any) -> Sequence[Any]:
        """Return what each process of all replicas has, on every one."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The rank of each partition; None where all are in this process."""

    def made(self, run: Callable[[Any], Any], batch: Any, reads: Callable[[], Hashable]) -> Any:
        """Return what a step makes of a batch; ``reads`` says what else its Python reads."""

    def settle(self, program: Program) -> None:
        """Move the tensors of a program to the places of their partitions, where there are several in this process."""

    def gathered(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """Run something on the whole model, which lies in one place meanwhile; gives what brings values there."""

    def gather(self) -> None:
        """Move every tensor back to one place, until the next step."""

    def spread(self) -> None:
        """Move every tensor to its place."""

    def device_of(self, partition: int) -> torch.device | None:
        """Return where a partition is; None where it stayed where it was."""

    def running(self, step: int, evaluates: bool = False) -> AbstractContextManager[None]:
        """Run a step. An error inside ends the run on all ranks."""

    def show(self, batch: Any) -> None:
        """Take note of the batch of this step, which has to be the same on all ranks."""

    def receive_target(self, boundary: int, peer: int, lag: int = 0) -> Sequence[Any]:
        """Receive the gradients that another rank gave to a boundary's values some steps ago."""

    def receive_weights(self, partition: int, peer: int, lag: int = 0) -> Sequence[Any]:
        """Receive the values that parameters got by an update on another rank some steps ago."""

    def told(self, value: Any) -> Any:
        """Return what the last partition's rank has, on every rank."""

    def collected(self, own: Any) -> Sequence[Any]:
        """Return what each rank has, in the order of ranks, on every rank."""

    def share(self, tensor: Tensor, rank: int) -> None:
        """Give a tensor what it holds on a rank, on every rank; they all call it."""

    def restart(self, lag: int) -> None:
        """Forget what is under way, on every rank: the run goes on from a saved state, with its lag."""

    def listen(self, signals: Sequence[int], steps: int) -> None:
        """Stop the run where one of these signals comes, to any rank. Every rank calls it, with the number of steps done."""

    def stopped(self, steps: int) -> int:
        """Return the signal after which all ranks stop with so many steps done; 0 where they go on. Each asks after every step."""

    def close(self) -> None:
        """Wait until all ranks have what they need of each other, and give up the connections."""


class InOnePlace:
    """What an engine does where all partitions of this process are in one place: nothing."""

    places: tuple[int, ...] = ()
    named: tuple[Any, ...] = ()
    home: torch.device | None = None
    captures = False
    replica, replicas = 0, 1
    process = 0
    lag = 0

    @property
    def group(self) -> Any:
        """There is no process group."""
        return None

    def total(self, tensor: Tensor) -> int:
        """Do nothing: there is one replica."""
        return 1

    def agreed(self, own: Any) -> Sequence[Any]:
        """Return what this process has: there is one replica."""
        return [own]

    def made(self, run: Callable[[Any], Any], batch: Any, reads: Callable[[], Hashable]) -> Any:
        """Run a step."""
        return run(batch)

    def settle(self, program: Program) -> None:
        """Do nothing: all tensors stay where they are."""

    def gathered(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """Run something: the model is in one place, and so are values."""
        return nullcontext(lambda values: values)

    def gather(self) -> None:
        """Do nothing."""

    def spread(self) -> None:
        """Do nothing."""

    def device_of(self, partition: int) -> torch.device | None:
        """Return nothing: all stayed where they were."""
        return None


class OneProcess(InOnePlace):
    """The engine of a run in one process: nothing has to be carried."""

    rank = 0
    ranks: tuple[int, ...] | None = None

    def __init__(self) -> None:
        self.signals = Signals()

    def running(self, step: int, evaluates: bool = False) -> AbstractContextManager[None]:
        """Run a step."""
        return nullcontext()

    def show(self, batch: Any) -> None:
        """Do nothing: there is one batch."""

    def receive_target(self, boundary: int, peer: int, lag: int = 0) -> Sequence[Any]:
        """Return nothing: there are no other ranks."""
        return ()

    def receive_weights(self, partition: int, peer: int, lag: int = 0) -> Sequence[Any]:
        """Return nothing: there are no other ranks."""
        return ()

    def told(self, value: Any) -> Any:
        """Return the value: it is here."""
        return value

    def collected(self, own: Any) -> Sequence[Any]:
        """Return the one process's own."""
        return [own]

    def share(self, tensor: Tensor, rank: int) -> None:
        """Do nothing: there are no other ranks."""

    def restart(self, lag: int) -> None:
        """Do nothing: nothing is under way."""

    def listen(self, signals: Sequence[int], steps: int) -> None:
        """Stop the run where one of these signals comes."""
        self.signals.listen(signals)

    def stopped(self, steps: int) -> int:
        """Return the signal that came."""
        return self.signals.taken()

    def close(self) -> None:
        """Let signals do what they did before."""
        self.signals.pass_on()
