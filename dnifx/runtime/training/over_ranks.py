"""A trainer over ranks: what each rank holds of the weights and states, and how all ranks come to hold everything."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch

from dnifx.engines.base import Engine
from dnifx.errors import StateError
from dnifx.ir import Kind
from dnifx.runtime.net.arguments import model_keywords
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.exchange import Exchange
from dnifx.runtime.training.holding import Holding, own_tensors
from dnifx.runtime.training.initializing import Initialize, initialize
from dnifx.runtime.training.part import TrainedPart
from dnifx.runtime.training.results import StepResult
from dnifx.runtime.training.shard_states import load, whole
from dnifx.runtime.training.updates import Update

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
    holding: Holding

    @property
    @abstractmethod
    def groups(self) -> dict[str, Mapping[str, Any]]:
        """Optimizers and learning-rate schedulers, by name."""

    @property
    def lag(self) -> int:
        """Steps that targets are late, as it was given, chosen or loaded. It is saved with the schedule."""
        return int(self.source.state_dict().get("lag", 0))

    @property
    def latest(self) -> int:
        """Steps that a target or the new values of a tied parameter are late at most."""
        return max(self.lag, self.source.state_dict().get("tied") or 0)

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
        self.holding.refuse_blank()
        with self.engine.running(self.steps, evaluates=True):
            self.engine.show((args, given))
            output = self.parts[0].evaluate(args, given)
        return self.engine.told(output) if gather else output

    def collect(self) -> None:
        """Bring all weights together, until the next step. Then the net can be called.

        Over ranks every rank calls it, and gets the weights and states of all. Over devices the weights go back to where they were.
        """
        collect(self)

    def initialize(self, function: Initialize | None = None) -> None:
        """Over ranks, give the weights that this rank holds their first values, where the model was made on the meta device.

        Every rank calls it. Random numbers depend on ``torch.initial_seed()`` of the first rank and on a module's path alone, so that the
        weights are the same on any number of ranks. Estimators are made anew.

        Args:
            function: Is called with each module that itself holds such weights, on the CPU; by default its ``reset_parameters``.

        Raises:
            StateError: The weights have values, or a module has no ``reset_parameters``.
        """
        initialize(self.holding, function)

    def close(self) -> None:
        """Over ranks, wait for the others and give up the connections; every rank calls it. At exit this happens by itself."""
        self.engine.close()


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
    trainer.holding.bring()
    own = whole(own_state(trainer), trainer.holding.shards)
    for rank, state in enumerate(trainer.engine.collected(own)):
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
        receive_tied(trainer, part)


def receive_tied(trainer: OverRanks, part: TrainedPart) -> None:
    """Receive what updates on other ranks have made, and partitions here are to read in the steps to come."""
    engine, partitions = trainer.engine, trainer.net.program.partitions
    if engine.ranks is None:
        return
    here = {name for each in partitions if engine.ranks[each.index] == engine.rank for name in each.uses}
    for step in range(part.steps, part.steps + engine.lag):
        renewed = (each for each in trainer.source.at(step, trainer.net.program).actions if each.kind is Kind.RENEW)
        for action in renewed:
            sent, peer = step - action.lag, engine.ranks[action.index]
            paths = [name for name in partitions[action.index].parameters if name in here]
            if peer != engine.rank and 0 <= sent < part.steps and part.tied.lacks(step, paths):
                part.tied.file(step, paths, engine.receive_weights(action.index, peer, part.steps - sent))


def own_state(trainer: OverRanks) -> dict[str, Any]:
    """Return what this rank alone keeps up to date beside weights: states of optimizers, late targets."""
    net, names = trainer.net, trainer.holding.names
    (part,) = trainer.parts
    boundaries = {each.key for each in net.boundaries if each.key in names}
    groups = {
        group: {name: each.state_dict() for name, each in items.items() if name in names}
        for group, items in trainer.groups.items()
    }
    flight = part.flight.state_dict({each.name for each in net.partitions if each.name in names}, boundaries)
    late = {key: kept for key, kept in part.late.state_dict().items() if key in boundaries}
    tied = part.tied.state_dict(own=True)
    updates = {name: each.state_dict() for name, each in trainer.updates.items() if name in names and each.count}
    return {"groups": groups, "late": late, "flight": flight, "tied": tied, "updates": updates}


def own_weights(trainer: OverRanks) -> dict[str, torch.Tensor]:
    """Return copies of the weights that this rank keeps up to date."""
    rank = trainer.engine.rank
    ranks = trainer.engine.ranks or (rank,) * len(trainer.net.partitions)
    return {name: value.detach().cpu().clone() for name, value in own_tensors(trainer.net, ranks, rank)}


def take_state(trainer: OverRanks, state: Mapping[str, Any], names: Set[str] | None = None) -> None:
    """Take what another rank keeps up to date; with ``names``, of the states of optimizers those of these names alone."""
    (part,) = trainer.parts
    for group, items in trainer.groups.items():
        for name, own in state["groups"][group].items():
            if names is None or name in names or group == "lr_schedulers":
                load(items[name], own)
    part.late.take(state["late"])
    part.flight.take(state["flight"])
    part.tied.take(state["tied"])
    for name, own in state["updates"].items():
        if names is None or name in names:
            trainer.updates[name].load_state_dict(own)
