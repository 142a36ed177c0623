"""A run over several processes: what a rank sends and receives, and how an error on one ends the run on all."""

import atexit
import gc
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from dnifx.engines.base import InOnePlace
from dnifx.engines.messages import Lost, Receiver, Sender
from dnifx.engines.processes import Processes
from dnifx.engines.stopping import Agreement, Signals
from dnifx.errors import RankError

PATIENCE = 60.0
"""Seconds for which a rank that has finished waits for the others."""

SAMPLES = 16
"""How many values of a tensor tell it from others."""

GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 calls them otherwise
SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_NUMBERS = count()


@dataclass(frozen=True)
class Traffic:
    """How many messages reach a rank in one step.

    Attributes:
        values: From each other rank, those with values.
        targets: From each other rank, those with the gradients of boundaries.
        gradients: From each other rank, those with the gradients of shared parameters.
        weights: From each other rank, those with new values of shared parameters.
        copies: From each other rank, those with parameters that estimators here copy.
    """

    values: Mapping[int, int]
    targets: Mapping[int, int]
    gradients: Mapping[int, int] = field(default_factory=dict)
    weights: Mapping[int, int] = field(default_factory=dict)
    copies: Mapping[int, int] = field(default_factory=dict)


CHANNELS = {
    "values": ("values", 0),
    "targets": ("targets", 0),
    "gradients": ("values", 2),
    "weights": ("targets", 2),
    "copies": ("targets", 4),
}
"""The process group and the tag of each kind of message; those of an evaluation have the next tag."""


def fingerprint(batch: Any) -> str:
    """Return a short text that tells most batches apart: from the shapes of tensors, and some values of those on the CPU."""
    seen: list[Any] = []
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            seen.append((tuple(leaf.shape), leaf.dtype))
            if leaf.device.type == "cpu" and leaf.layout is torch.strided:
                flat = leaf.detach().reshape(-1)
                seen.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].tolist())
        elif isinstance(leaf, bool | int | float | str):
            seen.append(leaf)
    return f"{zlib.crc32(repr(seen).encode()):x}"


class Ranks(InOnePlace):
    """The engine of a run over several processes, on gloo.

    Each direction has a process group of its own: values go to later partitions, targets to earlier ones. A send never waits
    for the receiver while few messages are under way; a receive waits for its message alone.

    Args:
        ranks: The rank of each partition.
        lag: Steps that a message may be late.
        tied: Steps that the new values of tied parameters are late; 0 where they are waited for.
        traffic: What reaches this rank.
        device: Where this rank computes.
        timeout: Seconds after which a rank that says nothing counts as gone.
        processes: Which are the ranks of this replica, and which average with this one.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        lag: int,
        tied: int,
        traffic: Traffic,
        device: torch.device,
        timeout: float,
        processes: Processes,
    ) -> None:
        self.rank, self.ranks, self.lag, self.tied, self.processes = processes.rank, ranks, lag, tied, processes
        self.replica, self.replicas = processes.replica, len(processes.rows)
        self.traffic, self.device, self.timeout = traffic, device, timeout
        self._groups = {each: self._group(*processes.rows) for each in ("values", "targets", "control")}
        self._groups["everyone"] = self._groups["control"]
        if len(processes.rows) > 1:
            self._groups |= {
                "alike": self._group(*zip(*processes.rows, strict=True)),
                "everyone": self._group(processes.everyone),
            }
        self.process = dist.get_rank()
        number = [next(_NUMBERS)]
        dist.broadcast_object_list(number, processes.rows[0][0], self._groups["everyone"])
        kept = torch.distributed.distributed_c10d._get_default_store()
        self._store = torch.distributed.distributed_c10d.PrefixStore(f"dnifx/{number[0]}", kept)
        self._senders: dict[tuple[str, int, bool], Sender] = {}
        self._receivers: dict[tuple[str, int, bool], Receiver] = {}
        self._step, self._evaluates, self._evaluations, self._epoch, self._ended = 0, False, 0, 0, ""
        self._batch, self._signals = "", Signals()
        self._agreement: Agreement | None = None
        atexit.register(self.close)

    def _group(self, *several: Sequence[int]) -> dist.ProcessGroup:
        """Return a new process group of those of several sets of processes in which this one is. All processes make all of them.

        So each has a name that none had before: a store keeps the addresses of a group that was closed.
        """
        limit = timedelta(seconds=self.timeout)
        made: list[dist.ProcessGroup] = [dist.new_group([*members], limit, "gloo") for members in several]
        return next(group for group, members in zip(made, several, strict=True) if dist.get_rank() in members)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of all ranks of all replicas. Who keeps it keeps its connections open."""
        return self._groups["everyone"]

    def total(self, tensor: Tensor) -> int:
        """Add a tensor up over the replicas, in place, and return how many there are. Every replica waits for all.

        Raises:
            RankError: Another process has failed.
        """
        with self.together():
            dist.all_reduce(tensor, group=self._groups["alike"])
        return self.replicas

    def mesh_of_replicas(self) -> DeviceMesh:
        """Return a mesh of the processes that have the same partitions. All call it.

        What a step waits for goes over the engine's own groups, which are closed when the run ends: a mesh keeps its own open.
        """
        self._groups["mesh"] = self._group(*zip(*self.processes.rows, strict=True))
        name = (
            f"replicas_{next(_NUMBERS)}"  # torch takes meshes of one name for the same, after the first is closed too
        )
        return DeviceMesh.from_group(self._groups["mesh"], self.device.type, mesh_dim_names=(name,))

    def gather_shards(self, whole: Tensor, own: Tensor) -> None:
        """Put the shards of all replicas one after the other into a tensor. Every replica waits for all."""
        with self.together():
            GATHER(whole, own, group=self._groups["alike"])

    def reduce_shards(self, own: Tensor, whole: Tensor, op: Any) -> None:
        """Reduce a tensor over the replicas, and put this one's shard of the result into another. Every replica waits for all."""
        with self.together():
            SCATTER(own, whole, op, group=self._groups["alike"])

    def agreed(self, own: Any) -> Sequence[Any]:
        """Return what each process of all replicas has, on every one. Every process waits for all."""
        found: list[Any] = [None] * len(self.processes.everyone)
        with self.together():
            dist.all_gather_object(found, own, self._groups["everyone"])
        return found

    def show(self, batch: Any) -> None:
        """Take note of the batch of this step, to be compared with that of the ranks whose values come here."""
        self._batch = fingerprint(batch)

    def send_values(self, partition: int, peer: int, *values: Any) -> None:
        """Send what a partition made to a rank; wait only if too many steps' values are under way."""
        self._send("values", partition, peer, (self._batch, *values))

    def receive_values(self, partition: int, peer: int) -> tuple[Any, ...]:
        """Receive what a partition on another rank made in this step.

        Raises:
            RankError: It made it of another batch.
        """
        batch, *values = self._received("values", peer, self._label(partition))
        if batch != self._batch:
            raise RankError(
                f"rank {self.process} was given another batch than rank {self.processes.members[peer]}. Every rank of a replica has to "
                "call step with the same batches in the same order: give the loader a generator of its own with the same seed "
                "(DataLoader(..., generator=...))"
            )
        return tuple(values)

    def send_target(self, boundary: int, peer: int, *gradients: Tensor | None) -> None:
        """Send the gradients that this rank gives to the values of a boundary; None where it used one not at all."""
        self._send("targets", boundary, peer, gradients)

    def receive_target(self, boundary: int, peer: int, lag: int = 0) -> tuple[Any, ...]:
        """Receive the gradients that another rank gave to a boundary's values ``lag`` steps ago."""
        index, step, epoch = self._label(boundary)
        return self._received("targets", peer, (index, step - lag, epoch))

    def send_gradients(self, partition: int, peer: int, *gradients: Tensor | None) -> None:
        """Send what a partition's backward pass gave to parameters that another rank updates; None for no gradient."""
        self._send("gradients", partition, peer, gradients)

    def receive_gradients(self, partition: int, peer: int) -> tuple[Any, ...]:
        """Receive what the backward pass of a partition on another rank gave to parameters of this rank in this step."""
        return self._received("gradients", peer, self._label(partition))

    def send_weights(self, partition: int, peer: int, *values: Tensor) -> None:
        """Send the new values of parameters that a partition here has updated."""
        self._send("weights", partition, peer, values)

    def receive_weights(self, partition: int, peer: int, lag: int = 0) -> tuple[Any, ...]:
        """Receive the new values of parameters that a partition on another rank has updated ``lag`` steps ago."""
        index, step, epoch = self._label(partition)
        return self._received("weights", peer, (index, step - lag, epoch))

    def send_copies(self, boundary: int, peer: int, *values: Tensor) -> None:
        """Send the present values of parameters that the estimator of a boundary on another rank copies."""
        self._send("copies", boundary, peer, values)

    def receive_copies(self, boundary: int, peer: int) -> tuple[Any, ...]:
        """Receive the present values of parameters that the estimator of a boundary here copies."""
        return self._received("copies", peer, self._label(boundary))

    def _send(self, way: str, index: int, peer: int, content: Sequence[Any]) -> None:
        """Send a message; wait only if too many steps' messages are under way."""
        label, sender = self._label(index), self._sender(way, peer)
        sender.send(label, content)
        sender.settle(label[1] - self.lag - 2, self._epoch)

    def _label(self, index: int) -> tuple[int, int, int]:
        return index, self._evaluations if self._evaluates else self._step, self._epoch

    def _sender(self, way: str, peer: int) -> Sender:
        key = way, peer, self._evaluates
        if key not in self._senders:
            group, tag = CHANNELS[way]
            self._senders[key] = Sender(self._groups[group], self.processes.members[peer], tag + self._evaluates)
        return self._senders[key]

    def _received(self, way: str, peer: int, label: tuple[int, int, int]) -> tuple[Any, ...]:
        key = way, peer, self._evaluates
        if key not in self._receivers:
            messages: int = getattr(self.traffic, way).get(peer, 1)
            ahead = messages * (self.lag + 2 if way in self._groups else 1 if way == "copies" else self.tied + 1)
            group, tag = CHANNELS[way]
            process = self.processes.members[peer]
            self._receivers[key] = Receiver(self._groups[group], process, tag + self._evaluates, ahead)
        found = self._receivers[key].receive(label)
        return tuple(each.to(self.device) if isinstance(each, Tensor) else each for each in found)

    @contextmanager
    def running(self, step: int, evaluates: bool = False) -> Iterator[None]:
        """Run a step. An error inside ends the run on all ranks, each with an error that names the first rank to fail.

        Raises:
            RankError: Another rank has failed.
        """
        if self._ended:
            raise RankError(f"this run has ended: {self._ended}")
        self._step, self._evaluates = step, evaluates
        self._evaluations += evaluates
        for receiver in self._receivers.values():
            receiver.forget(self._epoch, step - self.lag)
        try:
            yield
        except Lost as error:
            self._end(f"rank {error.peer} is gone: {error}")
            raise RankError(
                f"step {step} on rank {self.process} cannot go on: {self._ended}. The run has ended on all ranks"
            ) from error
        except BaseException as error:
            self._end(f"rank {self.process} stopped in step {step}: {type(error).__name__}: {error}")
            raise

    def _end(self, reason: str) -> None:
        """Tell the others why this rank stops, unless another was first, and close the connections, which wakes them."""
        self._ended = reason[:500]
        with suppress(RuntimeError):  # the process that keeps the store may be gone itself
            if self._store.add("faults", 1) == 1:
                self._store.set("fault", self._ended)
            else:
                self._ended = self._store.get("fault").decode()
        self._drop()

    def told(self, value: Any) -> Any:
        """Return what the last partition's rank has, on every rank. Every rank waits for it."""
        shared = [value]
        with self.together():
            dist.broadcast_object_list(shared, self.processes.members[self.ranks[-1]], self._groups["control"])
        return shared[0]

    def collected(self, own: Any) -> Sequence[Any]:
        """Return what each rank has, in the order of ranks, on every rank. Every rank waits for all."""
        found: list[Any] = [None] * len(self.processes.members)
        with self.together():
            dist.all_gather_object(found, own, self._groups["control"])
        order = sorted(self.processes.members)  # that of the process group
        return [found[order.index(process)] for process in self.processes.members]

    def share(self, tensor: Tensor, rank: int) -> None:
        """Give a tensor what it holds on a rank, on every rank. Every rank waits for it."""
        own = tensor.detach().contiguous().cpu()
        with self.together():
            dist.broadcast(own.reshape(-1).view(torch.uint8), self.processes.members[rank], self._groups["control"])
        if self.rank != rank:
            tensor.copy_(own)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something for which processes wait for each other.

        Raises:
            RankError: Another process has failed.
        """
        try:
            yield
        except RuntimeError as error:
            self._end(f"{self._gone()}: {error}")
            raise RankError(
                f"rank {self.process} cannot go on: {self._ended}. The run has ended on all ranks"
            ) from error

    def _gone(self) -> str:
        """Say which rank is gone, after all together failed: a connection that was closed takes no message."""
        for peer in (each for each in self.processes.everyone if each != self.process):
            try:
                dist.isend(torch.zeros(1), peer, self._groups["everyone"], tag=1)
            except RuntimeError:
                return f"rank {peer} is gone"
        return "a rank is gone"

    def listen(self, signals: Sequence[int], steps: int) -> None:
        """Stop the run on all ranks after the same step where one of these signals comes to one of them. Every rank calls it."""
        self._signals.listen(signals)
        if self._agreement is None:
            self._groups["signals"] = self._group(self.processes.everyone)
            self._agreement = Agreement(self._signals, self._store, self._groups["signals"], steps)

    def stopped(self, steps: int) -> int:
        """Return the signal after which all ranks stop with so many steps done; 0 where they go on.

        Raises:
            RankError: A rank is gone, before it said when it stops.
        """
        if self._agreement is None:
            return 0
        with self.together():
            number = self._agreement.after(steps)
        if number:
            self._signals.taken()
        return number

    def restart(self, lag: int) -> None:
        """Forget what is under way: messages from before have another epoch, and nobody asks for them."""
        self._epoch, self.lag = self._epoch + 1, max(self.lag, lag)

    def close(self) -> None:
        """Wait until all ranks have what they need of each other, and give up the connections.

        A rank whose script ended by an error tells the others, and does not wait.
        """
        atexit.unregister(self.close)
        if self._ended:
            return
        failed = getattr(sys, "last_value", None)
        if failed is not None:
            self._end(f"rank {self.process} stopped after step {self._step}: {type(failed).__name__}: {failed}")
            return
        with suppress(RuntimeError):  # where a rank is gone
            dist.barrier(self._groups["everyone"], async_op=True).wait(timedelta(seconds=min(self.timeout, PATIENCE)))
        self._ended = "the trainer was closed"
        self._drop()
        self._signals.pass_on()

    def _drop(self) -> None:
        agreement, self._agreement = self._agreement, None
        self._signals.close()
        groups, self._groups = self._groups, {}
        self._senders, self._receivers = {}, {}
        for group in {id(each): each for each in groups.values()}.values():
            if dist.is_initialized():
                dist.destroy_process_group(group)
        del groups
        gc.collect()
        if agreement is not None:
            agreement.close()
