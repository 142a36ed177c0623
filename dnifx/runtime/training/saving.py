"""Saving a trainer and going on from what was saved."""

from collections.abc import Mapping
from typing import Any, Protocol

from dnifx.errors import StateError
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.exchange import Exchange
from dnifx.runtime.training.part import TrainedPart


class Saved(Protocol):
    """What of a trainer is saved."""

    net: Net
    steps: int
    source: Any
    parts: tuple[TrainedPart, ...]
    exchange: Exchange | None

    @property
    def groups(self) -> dict[str, Mapping[str, Any]]:
        """Optimizers and learning-rate schedulers, by name."""


def saved(trainer: Saved) -> dict[str, Any]:
    """Return all that a run needs to go on."""
    return {
        "steps": trainer.steps,
        "net": trainer.net.state_dict(),
        **{group: {name: each.state_dict() for name, each in items.items()} for group, items in trainer.groups.items()},
        "schedule": trainer.source.state_dict(),
        "parts": [part.state_dict() for part in trainer.parts],
        "messages": [each.state_dict() for each in trainer.exchange.buffers] if trainer.exchange is not None else [],
    }


def take_up(trainer: Saved, state: Mapping[str, Any]) -> None:
    """Let a trainer go on from a saved state.

    Raises:
        StateError: It belongs to another trainer.
    """
    missing = sorted({"steps", "net", "schedule", "parts", "messages"} - set(state))
    if missing:
        raise StateError(f"the saved state lacks {', '.join(missing)}; give what trainer.state_dict() returned")
    if len(state["parts"]) != len(trainer.parts):
        raise StateError(
            f"the saved state has {len(state['parts'])} parts of {len(trainer.parts)}; make the trainer with the same model, cuts and "
            "rates"
        )
    for group, items in trainer.groups.items():
        if set(state.get(group, ())) != set(items):
            raise StateError(
                f"the saved state has {group} for {sorted(state.get(group, ()))}, this trainer for {sorted(items)}; "
                "make the trainer with the same model, cuts and optimizers"
            )
    try:
        trainer.net.load_state_dict(state["net"])
    except (KeyError, RuntimeError) as error:
        raise StateError(f"the saved weights do not fit this module: {error}") from error
    trainer.source.load_state_dict(state["schedule"])
    for part, kept in zip(trainer.parts, state["parts"], strict=True):
        part.load_state_dict(kept)
    for buffer, kept in zip(trainer.exchange.buffers if trainer.exchange else (), state["messages"], strict=True):
        buffer.load_state_dict(kept)
    for group, items in trainer.groups.items():
        for name, item in items.items():
            item.load_state_dict(state[group][name])
    trainer.steps = state["steps"]
