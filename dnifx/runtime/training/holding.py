"""Which weights a rank holds: those that its own partitions use. The others have no memory here, until all are brought together."""

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnifx.engines.base import Engine
from dnifx.errors import InputError, StateError
from dnifx.runtime.net.absent import Absent, hold, let_go
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.optimizer_set import OptimizerSet
from dnifx.runtime.training.shards import Shards
from dnifx.runtime.training.weights import named_tensors, read_names, shared_memory

ELSEWHERE = (
    "the present weights of {names} are on other ranks. Evaluate with trainer.evaluate(x), which runs over the same ranks; or call "
    "trainer.collect() on every rank, which brings all weights here until the next step"
)


BLANK = (
    "the weight {name!r} has no values yet, since the model was made on the meta device: give this rank's weights values by "
    "trainer.load(folder), from a save of such a trainer, or by trainer.initialize()"
)


class Holding:
    """The weights of a net over ranks: parameters, buffers and estimators.

    Args:
        net: The net.
        engine: Says which partitions run here.
        optimizers: Those of all partitions and estimators, by the name of what each updates.
        shards: The weights that are sharded over replicas, or None.

    Attributes:
        elsewhere: Which weights are in other processes after a step; empty where all are here.
        names: The names of partitions and the keys of boundaries whose optimizers update here.
        own: The names of the weights that this rank keeps up to date or reads.
        whole: Whether this rank holds all weights.
        blank: Whether weights of this rank have no values yet, since the model was made on the meta device.
    """

    def __init__(
        self, net: Net, engine: Engine, optimizers: Mapping[str, Optimizer], shards: Shards | None = None
    ) -> None:
        self.net, self.engine, self.optimizers, self.whole, self.shards = net, engine, optimizers, True, shards
        ranks = engine.ranks or (engine.rank,) * len(net.partitions)
        self.elsewhere = elsewhere(net, ranks, engine.rank) or ("" if shards is None else shards.note)
        self.names = names_on(net, ranks, engine.rank)
        self.homes: dict[str, int] = {}
        self.others: dict[str, Tensor] = {}
        self.own: Set[str] = frozenset()
        self.blank = False
        if engine.ranks is not None:
            self.divide(engine.ranks)
        if shards is not None:
            net.elsewhere = self.elsewhere

    def divide(self, ranks: tuple[int, ...]) -> None:
        """Find which weights are whose. What no rank reads stays everywhere."""
        own = {rank: dict(own_tensors(self.net, ranks, rank)) for rank in sorted({*ranks})}
        self.homes = {name: rank for rank in reversed(own) for name in own[rank]}
        here = [*read_tensors(self.net, ranks, self.engine.rank), *own[self.engine.rank].values()]
        read = {id(each) for each in here}
        found = (each for tensors in own.values() for each in tensors.items())
        self.others = {name: each for name, each in found if id(each) not in read}
        self.own = self.homes.keys() - self.others.keys()
        if any(each.is_meta for _, each in self.named(self.homes)):
            self.wait_for_values()

    def wait_for_values(self) -> None:
        """Let the weights of this rank that are on the meta device have no values, until they are loaded or initialized."""
        self.let_go()
        waiting = [(name, each) for name, each in self.named(self.own) if each.is_meta]
        without_leftovers([each for _, each in waiting])
        for name, each in waiting:
            if not let_go(each, BLANK.format(name=name)):
                raise StateError(
                    f"the weight {name!r} on the meta device cannot be given values later, since something else refers to it; drop what "
                    "refers to it, or build the model on the CPU"
                )
        self.blank = True
        self.net.elsewhere = self.elsewhere or BLANK.format(name=waiting[0][0])

    def named(self, names: Iterable[str]) -> list[tuple[str, Tensor]]:
        """Return weights with their names."""
        tensors = dict(named_tensors(self.net))
        return [(name, tensors[name]) for name in names]

    def refuse_blank(self) -> None:
        """Raise StateError where weights of this rank have no values yet."""
        if self.blank:
            raise StateError(BLANK.format(name=sorted(self.own)[0]))

    def let_go(self) -> None:
        """Free the memory of what other ranks hold: weights, and the states of their optimizers. Of what is sharded, keep a share."""
        if self.shards is not None:
            self.shards.divide()
        if not self.whole or not self.others:
            return
        self.whole = False
        without_leftovers(self.others.values())
        memory = shared_memory(self.net)
        for name, each in self.others.items():
            if not isinstance(each, Absent) and (each.is_meta or each.untyped_storage().data_ptr() not in memory):
                where = f"the weight {name!r} is on rank {self.homes[name]}, and this is rank {self.engine.rank}"
                let_go(each, f"{where}: {self.elsewhere}")
        for name, optimizer in self.optimizers.items():
            if name not in self.names:
                forget(optimizer)
        give_back()

    def make_room(self) -> None:
        """Give all weights memory; what is in those of other ranks is not defined. What is sharded is gathered."""
        if self.shards is not None:
            self.shards.gather()
        for each in self.others.values():
            hold(each)
        self.whole = True

    def bring(self) -> None:
        """Bring the present weights of all ranks to every rank, which all have to call it."""
        if self.engine.ranks is None:
            return
        self.refuse_blank()
        self.make_room()
        tensors = dict(named_tensors(self.net))
        with torch.no_grad():
            for name, rank in self.homes.items():
                self.engine.share(tensors[name], rank)

    def foresee(self, known: Callable[[], bool]) -> None:
        """Where a replica needs whole weights for its inputs, bring them to all: to capture, or to find whether a graph holds.

        Args:
            known: Whether a graph is known to hold here.
        """
        if self.shards is not None and self.shards.anyone(not known()):
            self.bring()

    def bring_foreseen(self) -> None:
        """Bring the present weights of all ranks here. Of sharded ones this was foreseen, since all replicas take part.

        Raises:
            InputError: It was not.
        """
        if self.shards is None:
            self.bring()
        elif not self.shards.whole:
            raise InputError(
                "these inputs need another graph, as a guard found in the middle of a step, and other replicas do not wait to capture it "
                "together. Call the net on such inputs before net.trainer(...), or give replicas='average'"
            )


def without_leftovers(tensors: Iterable[Tensor]) -> None:
    """Collect what refers weakly to tensors and is not used any more, such as what was recorded of them."""
    if any(weakref.getweakrefcount(each) for each in tensors):
        gc.collect()


def give_back() -> None:
    """Let the C library give free memory back to the system, where it can: it keeps what a capture has taken, too."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def elsewhere(net: Net, ranks: Sequence[int], rank: int) -> str:
    """Say which weights are in other processes after a step; empty where all are here."""
    names = [each.name for each in net.partitions if ranks[each.index] != rank]
    return ELSEWHERE.format(names=", ".join(names[:4]) + (" ..." if len(names) > 4 else "")) if names else ""


def names_on(net: Net, ranks: Sequence[int], rank: int) -> frozenset[str]:
    """Return the names of the partitions, and the keys of the boundaries, that a rank updates."""
    partitions = {each.name for each in net.partitions if ranks[each.index] == rank}
    return frozenset(partitions | {each.key for each in net.boundaries if ranks[each.producer] == rank})


def forget(optimizer: Optimizer) -> None:
    """Drop what an optimizer keeps of its parameters."""
    for each in optimizer.optimizers if isinstance(optimizer, OptimizerSet) else (optimizer,):
        each.state.clear()


def own_tensors(net: Net, ranks: Sequence[int], rank: int) -> Iterator[tuple[str, Tensor]]:
    """Return the weights that a rank keeps up to date, and those that no rank changes and that it reads."""
    parameters = dict(net.original.named_parameters())
    trained = {id(parameters[name]) for each in net.partitions for name in each.uses}
    own = {id(parameters[name]) for each in net.partitions if ranks[each.index] == rank for name in each.parameters}
    own |= {id(each) for each in read_tensors(net, ranks, rank) if id(each) not in trained}
    yield from ((name, value) for name, value in named_tensors(net) if id(value) in own)


def read_tensors(net: Net, ranks: Sequence[int], rank: int) -> list[Tensor]:
    """Return the parameters and buffers that the partitions and the estimators of a rank read."""
    tensors = dict(named_tensors(net.original))
    here = {each.index for each in net.partitions if ranks[each.index] == rank}
    found = [tensors[name] for name in read_names(net.program, here, tensors)]
    for boundary, interface in zip(net.boundaries, net.program.interfaces, strict=True):
        if boundary.producer in here:
            found += [each for _, each in named_tensors(interface.estimator)]
            found += [mirror.source for mirror in getattr(interface.estimator, "mirrors", ())]
        elif interface.mirrors:
            own = {name for each in net.partitions if each.index in here for name in each.parameters}
            if own.intersection(interface.mirrors):
                found.append(interface.estimator.get_buffer("answers"))  # says when copies are due
    return found
