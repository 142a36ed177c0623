"""Files that are written whole or not at all, and checkpoints to resume from."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dnifx.errors import StateError

FORMAT = 1

RENAMED = {"arm": "variant"}
"""Settings that had another name in older checkpoints, and their present name."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one move, so that a half-written file is never seen.

    Args:
        path: The file. Its folder is created if it does not exist.
        write: Writes the whole file to the path that it is given, a temporary one beside ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Checkpoint:
    """The file that holds the state of one training run.

    Attributes:
        path: The file.
        settings: The settings that the run depends on, by name. A run with others cannot resume.
    """

    path: Path
    settings: Mapping[str, Any]

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``state``, a tree of tensors, numbers, strings, lists and dicts."""
        content = {"format": FORMAT, "settings": dict(self.settings), "state": dict(state)}
        write_whole(self.path, lambda part: torch.save(content, part))

    def load(self) -> Mapping[str, Any] | None:
        """Return the last saved state, or None if there is none.

        Raises:
            StateError: The file is not a checkpoint, or belongs to a run with other settings.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, OSError, UnpicklingError) as error:
            raise StateError(
                f"{self.path} cannot be read as a checkpoint: {error}; remove it to start again"
            ) from error
        self._check(content)
        state: Mapping[str, Any] = content["state"]
        return state

    def _check(self, content: Any) -> None:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StateError(f"{self.path} is not a checkpoint of format {FORMAT}; remove it, or give another --out")
        saved = {RENAMED.get(name, name): value for name, value in content["settings"].items()}
        names = sorted({*saved, *self.settings})
        other = [name for name in names if saved.get(name) != self.settings.get(name)]
        if other:
            differences = ", ".join(f"{name}: {saved.get(name)!r}, now {self.settings.get(name)!r}" for name in other)
            raise StateError(
                f"{self.path} is the checkpoint of a run with other settings ({differences}); "
                "give the same settings to resume it, or another --out"
            )


def checkpoint_of(options: Any, apart: Collection[str], name: str, own: Mapping[str, Any]) -> Checkpoint | None:
    """Return the checkpoint of one run, in ``options.out``; None if ``out`` is None.

    Args:
        options: The options of the experiment, a dataclass.
        apart: Options that the run does not depend on.
        name: Name of the file, without its ending.
        own: What distinguishes the run from others: its variant and its seed.
    """
    if options.out is None:
        return None
    depends = {key: value for key, value in asdict(options).items() if key not in {*apart, "out"}}
    return Checkpoint(options.out / "checkpoints" / f"{name}.pt", {**depends, **own})
