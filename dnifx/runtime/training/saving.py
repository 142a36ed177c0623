"""Saving a trainer and going on from what was saved."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from dnifx.errors import StateError
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.exchange import Exchange
from dnifx.runtime.training.holding import Holding
from dnifx.runtime.training.part import TrainedPart
from dnifx.runtime.training.scaling import Scaling
from dnifx.runtime.training.shard_states import load, whole
from dnifx.runtime.training.updates import Update


class Saved(Protocol):
    """What of a trainer is saved."""

    net: Net
    steps: int
    source: Any
    parts: tuple[TrainedPart, ...]
    exchange: Exchange | None
    updates: dict[str, Update]
    scaling: Scaling | None
    holding: Holding

    @property
    def groups(self) -> dict[str, Mapping[str, Any]]:
        """Optimizers and learning-rate schedulers, by name."""


def saved(trainer: Saved) -> dict[str, Any]:
    """Return all that a run needs to go on."""
    net, shards = trainer.net.state_dict(), trainer.holding.shards
    groups = {
        group: {name: each.state_dict() for name, each in items.items()} for group, items in trainer.groups.items()
    }
    updates = {name: each.state_dict() for name, each in trainer.updates.items() if each.count}
    return {
        "steps": trainer.steps,
        "net": net,
        **whole(groups, shards),
        "schedule": trainer.source.state_dict(),
        "parts": [part.state_dict() for part in trainer.parts],
        "messages": [each.state_dict() for each in trainer.exchange.buffers] if trainer.exchange is not None else [],
        "updates": whole(updates, shards),
        **({"scaler": trainer.scaling.scaler.state_dict()} if trainer.scaling is not None else {}),
    }


def take_up(trainer: Saved, state: Mapping[str, Any]) -> None:
    """Let a trainer go on from a saved state. Where that is refused, all is put back as it was.

    Raises:
        StateError: It belongs to another trainer, or is damaged.
    """
    try:
        before = copied(saved(trainer), ["net", *trainer.groups])
    except StateError:  # a state that cannot be saved cannot be put back
        before = None
    try:
        refuse_others(trainer, state)
        trainer.holding.make_room()
        write(trainer, deepcopy(dict(state)))  # optimizers keep the tensors that they are given, and write to them
    except BaseException as error:
        if before is not None:
            for part, kept in zip(trainer.parts, before["parts"], strict=True):
                part.ownership.give_back(kept["adopted"])
            write(trainer, before)
        else:
            trainer.holding.let_go()
        if isinstance(error, DAMAGED):
            raise StateError(
                f"the saved state does not fit this trainer: {type(error).__name__}: {error}. Give what the state_dict() of a trainer of "
                "the same model, cuts and optimizers returned"
            ) from error
        raise


DAMAGED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a state that is not of this form raises where it is read."""


def copied(state: dict[str, Any], heavy: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a state; the tensors of its heavy entries are in the memory of the CPU, to leave that of a device free."""
    moved = {
        key: pytree.tree_map_only(torch.Tensor, lambda each: each.detach().to("cpu", copy=True), state[key])
        for key in heavy
    }
    return deepcopy({**state, **moved})


def refuse_others(trainer: Saved, state: Mapping[str, Any]) -> None:
    """Raise StateError where a state is of a trainer of other parts or other optimizers."""
    if not isinstance(state, Mapping):
        raise StateError(f"the saved state is {type(state).__name__}; give what trainer.state_dict() returned")
    missing = sorted({"steps", "net", "schedule", "parts", "messages"} - set(state))
    if missing:
        raise StateError(f"the saved state lacks {', '.join(missing)}; give what trainer.state_dict() returned")
    if type(state["steps"]) is not int:
        raise StateError(f"the saved state is damaged: it says that {state['steps']!r} steps are done")
    if len(state["parts"]) != len(trainer.parts):
        raise StateError(
            f"the saved state has {len(state['parts'])} parts of {len(trainer.parts)}; make the trainer with the same model, cuts and "
            "rates"
        )
    if "scaler" in state and trainer.scaling is None:
        raise StateError(
            "the saved state is of a trainer with a gradient scaler: give net.trainer(..., scaler=torch.amp.GradScaler(...)), or leave the "
            "entry 'scaler' out of the state"
        )
    for group, items in trainer.groups.items():
        if set(state.get(group, ())) != set(items):
            raise StateError(
                f"the saved state has {group} for {sorted(state.get(group, ()))}, this trainer for {sorted(items)}; "
                "make the trainer with the same model, cuts and optimizers"
            )


def write(trainer: Saved, state: Mapping[str, Any]) -> None:
    """Take up all of a saved state."""
    try:
        trainer.net.load_state_dict(state["net"])
    except (KeyError, RuntimeError) as error:
        raise StateError(f"the saved weights do not fit this module: {' '.join(str(error).split())[:300]}") from error
    trainer.source.load_state_dict(state["schedule"])
    for part, kept in zip(trainer.parts, state["parts"], strict=True):
        part.load_state_dict(kept)
    for buffer, kept in zip(trainer.exchange.buffers if trainer.exchange else (), state["messages"], strict=True):
        buffer.load_state_dict(kept)
    for group, items in trainer.groups.items():
        for name, item in items.items():
            load(item, state[group][name])
    for name, each in trainer.updates.items():
        each.load_state_dict(state.get("updates", {}).get(name, {"count": 0, "sums": {}}))
    if trainer.scaling is not None and "scaler" in state:
        trainer.scaling.scaler.load_state_dict(state["scaler"])
    trainer.steps, trainer.holding.blank = state["steps"], False
