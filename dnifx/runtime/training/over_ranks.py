"""A trainer over ranks: what each rank holds of the weights and states, and how all ranks come to hold everything."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dnifx.engines.base import Engine
from dnifx.errors import StateError
from dnifx.ir import Program
from dnifx.runtime.net.arguments import model_keywords
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.exchange import Exchange
from dnifx.runtime.training.part import TrainedPart
from dnifx.runtime.training.results import StepResult
from dnifx.runtime.training.updates import Update

ELSEWHERE = (
    "the present weights of {names} are on other ranks. Evaluate with trainer.evaluate(x), which runs over the same ranks; or call "
    "trainer.collect() on every rank, which brings all weights here until the next step"
)


SPREAD = (
    "the weights of this net are on {devices}. Evaluate with trainer.evaluate(x), which runs over the same devices; or call "
    "trainer.collect(), which brings all weights to one device until the next step"
)


class OverRanks(ABC):
    """What a trainer does over ranks, beside its steps. In one process there is nothing to bring together."""

    net: Net
    engine: Engine
    steps: int
    parts: tuple[TrainedPart, ...]
    updates: dict[str, Update]
    source: Any
    exchange: Exchange | None

    @property
    @abstractmethod
    def groups(self) -> dict[str, Mapping[str, Any]]:
        """Optimizers and learning-rate schedulers, by name."""

    @property
    def lag(self) -> int:
        """Steps that targets are late, as it was given, chosen or loaded. It is saved with the schedule."""
        return int(self.source.state_dict().get("lag", 0))

    def evaluate(self, *args: Any, gather: bool = False, kwargs: Mapping[str, Any] | None = None, **named: Any) -> Any:
        """Return the model's output without gradients; over ranks, every rank calls it, with the same inputs.

        Args:
            *args: The model's inputs.
            gather: Over ranks, return the output on every rank; else on the last partition's, and None on the others.
            kwargs: Keyword inputs of the model that are called ``gather`` or ``kwargs``.
            **named: Keyword inputs of the model.

        Raises:
            InputError: Over ranks, the model cannot be cut in its present mode.
            RankError: Another rank has failed.
        """
        given = model_keywords(named, kwargs)
        if self.engine.ranks is None and not self.engine.places:
            with torch.no_grad():
                return self.net(*args, kwargs=given)
        with self.engine.running(self.steps, evaluates=True):
            self.engine.show((args, given))
            output = self.parts[0].evaluate(args, given)
        return self.engine.told(output) if gather else output

    def collect(self) -> None:
        """Bring all weights together, until the next step. Then the net can be called.

        Over ranks every rank calls it, and gets the weights and states of all. Over devices the weights go back to where they were.
        """
        collect(self)

    def close(self) -> None:
        """Over ranks, wait for the others and give up the connections; every rank calls it. At exit this happens by itself."""
        self.engine.close()


def elsewhere(net: Net, engine: Engine) -> str:
    """Say which weights are in other processes after a step; empty where all are here."""
    ranks = engine.ranks or ()
    names = [each.name for each in net.partitions if ranks and ranks[each.index] != engine.rank]
    return ELSEWHERE.format(names=", ".join(names[:4]) + (" ..." if len(names) > 4 else "")) if names else ""


def told(engine: Engine, result: StepResult, diagnose: bool) -> StepResult:
    """Return the result of a step with the losses and diagnostics of all ranks; every rank has to call it."""
    losses = engine.told(result.losses)
    if not diagnose:
        return replace(result, losses=losses)
    found = {name: each for own in engine.collected(result.diagnostics) for name, each in own.items()}
    return replace(result, losses=losses, diagnostics=found)


def spread_over(engine: Engine) -> str:
    """Say on which devices the weights are; empty where they are on one."""
    devices = list(dict.fromkeys(str(each.device) for each in engine.named))
    return SPREAD.format(devices=", ".join(devices)) if len(devices) > 1 else ""


def refuse_elsewhere(net: Net, runs: bool = False) -> None:
    """Raise StateError where some of a net's weights have moved on in other processes, or, where it ``runs``, are on several devices."""
    if net.elsewhere or (runs and net.spread):
        raise StateError(net.elsewhere or net.spread)


def collect(trainer: OverRanks) -> None:
    """Let every rank hold the weights, the states of optimizers and the late targets of all. Every rank has to call it."""
    if trainer.engine.places:
        receive_late(trainer)
        trainer.engine.gather()
        trainer.net.spread = ""
    if trainer.engine.ranks is None:
        return
    receive_late(trainer)
    for rank, state in enumerate(trainer.engine.collected(own_state(trainer))):
        if rank != trainer.engine.rank:
            take_state(trainer, state)
    trainer.net.elsewhere = ""


def receive_late(trainer: OverRanks) -> None:
    """Receive the targets that are under way, so that what is kept is whole; they are used when their steps come."""
    (part,) = trainer.parts
    indices = {each.key: each.index for each in trainer.net.boundaries}
    with trainer.engine.running(part.steps):
        for key, kept in part.late.lacking():
            for rank in dict.fromkeys(kept.missing):
                kept.arrive(rank, trainer.engine.receive_target(indices[key], rank, part.steps - kept.step))
        part.flight.complete(part.steps, trainer.engine.receive_target)


def own_state(trainer: OverRanks) -> dict[str, Any]:
    """Return what this rank alone keeps up to date: weights, buffers, states of optimizers, late targets."""
    net, rank = trainer.net, trainer.engine.rank
    ranks = trainer.engine.ranks or (rank,) * len(net.partitions)
    (part,) = trainer.parts
    boundaries = {each.key for each in net.boundaries if ranks[each.producer] == rank}
    names = {each.name for each in net.partitions if ranks[each.index] == rank} | boundaries
    tensors = {name: value.detach().cpu().clone() for name, value in own_tensors(net, ranks, rank)}
    groups = {
        group: {name: each.state_dict() for name, each in items.items() if name in names}
        for group, items in trainer.groups.items()
    }
    flight = part.flight.state_dict({each.name for each in net.partitions if ranks[each.index] == rank}, boundaries)
    late = {key: kept for key, kept in part.late.state_dict().items() if key in boundaries}
    updates = {name: each.state_dict() for name, each in trainer.updates.items() if name in names and each.count}
    return {"tensors": tensors, "groups": groups, "late": late, "flight": flight, "updates": updates}


def take_state(trainer: OverRanks, state: Mapping[str, Any]) -> None:
    """Take what another rank keeps up to date."""
    (part,) = trainer.parts
    tensors = dict(named_tensors(trainer.net))
    with torch.no_grad():
        for name, value in state["tensors"].items():
            tensors[name].copy_(value)
    for group, items in trainer.groups.items():
        for name, own in state["groups"][group].items():
            items[name].load_state_dict(own)
    part.late.take(state["late"])
    part.flight.take(state["flight"])
    for name, own in state["updates"].items():
        trainer.updates[name].load_state_dict(own)


def named_tensors(net: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Return all parameters and buffers of a net by each of their names."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


def own_tensors(net: Net, ranks: tuple[int, ...], rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the parameters and buffers that a rank keeps up to date."""
    parameters = dict(net.original.named_parameters())
    here = [each for each in net.partitions if ranks[each.index] == rank]
    own = {id(parameters[name]) for each in here for name in each.parameters}
    buffers = dict(net.original.named_buffers(remove_duplicate=False))
    own |= {id(buffers[name]) for name in read_buffers(net.program, {each.index for each in here}, buffers)}
    for boundary, interface in zip(net.boundaries, net.program.interfaces, strict=True):
        if ranks[boundary.producer] == rank:
            own |= {id(value) for _, value in named_tensors(interface.estimator)}
    yield from ((name, value) for name, value in named_tensors(net) if id(value) in own)


def read_buffers(program: Program, partitions: set[int], buffers: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the buffers that the nodes of some partitions read."""
    found: set[str] = set()
    for node in program.graph.nodes if program.graph is not None else ():
        homes = {program.partition_of.get(each.name) for each in (node, *(node.users if node.op == "get_attr" else ()))}
        if homes & partitions and node.op in ("get_attr", "call_module"):
            found |= {name for name in buffers if name == node.target or name.startswith(f"{node.target}.")}
    return found
