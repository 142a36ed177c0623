"""Mistakes in saved states and folders."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.mistakes.nets import decouple, model, trainer


def load(change: Callable[[dict[str, Any]], Any]) -> None:
    """Load a changed state of a trainer."""
    made = trainer()
    made.load_state_dict(change(made.state_dict()))


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def to_folder(file: bool, below: bool) -> None:
    """Write a net to a folder that is there, or whose place is a file."""
    with tempfile.TemporaryDirectory(prefix="dnifx-mistakes") as scratch:
        place = Path(scratch)
        if file:
            place /= "file"
            place.write_text("mine")
        decouple().to_folder(place / "deeper" if below else place)


MISTAKES: Mapping[str, Callable[[], object]] = {
    "`load_state_dict(None)`": lambda: load(lambda state: None),
    "an empty state": lambda: load(lambda state: {}),
    "the net's state alone": lambda: load(lambda state: state["net"]),
    "a state without weights": lambda: load(lambda state: without(state, "net")),
    "a state without optimizers": lambda: load(lambda state: without(state, "optimizers")),
    "a state without parts": lambda: load(lambda state: {**state, "parts": []}),
    "a state with text in it": lambda: load(lambda state: {**state, "parts": ["text"]}),
    "a state without a number of steps": lambda: load(lambda state: {**state, "steps": None}),
    "a state of another width": lambda: load(lambda state: trainer(module=model(7)).state_dict()),
    "a state of other cuts": lambda: load(lambda state: trainer(cuts=["0", "1"]).state_dict()),
    "a state of another schedule": lambda: load(lambda state: trainer("warm_up{steps=2}").state_dict()),
    "a state of another estimator": lambda: load(lambda state: trainer(gradient="zero").state_dict()),
    "a folder that is there": lambda: to_folder(file=False, below=False),
    "a folder whose name is a file's": lambda: to_folder(file=True, below=False),
    "a folder below a file": lambda: to_folder(file=True, below=True),
}
