"""Files of an experiment, written whole or not at all, and the checkpoints that it resumes from."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dnifx.errors import StateError

FORMAT = 1


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path`` and put it there in one move, so that no half file is ever seen.

    Args:
        path: The file; its folder is made where it is absent.
        write: Writes the whole file at the path it is given, which ends as ``path`` does.
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
    """One file that holds how far a training run came.

    Attributes:
        path: The file.
        settings: What the run depends on, by name; a run with other settings does not take it up.
    """

    path: Path
    settings: Mapping[str, Any]

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``state``, a tree of tensors, numbers, texts, lists and dicts."""
        content = {"format": FORMAT, "settings": dict(self.settings), "state": dict(state)}
        write_whole(self.path, lambda part: torch.save(content, part))

    def load(self) -> Mapping[str, Any] | None:
        """Return the state that was saved last, or None where none was.

        Raises:
            StateError: Where the file is no checkpoint, or that of a run with other settings.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError, OSError, UnpicklingError) as error:
            raise StateError(
                f"{self.path} cannot be read as a checkpoint: {error}; remove it to start afresh"
            ) from error
        self._check(content)
        state: Mapping[str, Any] = content["state"]
        return state

    def _check(self, content: Any) -> None:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StateError(f"{self.path} is no checkpoint of format {FORMAT}; remove it, or give another --out")
        saved = content["settings"]
        names = sorted({*saved, *self.settings})
        other = [name for name in names if saved.get(name) != self.settings.get(name)]
        if other:
            differences = ", ".join(f"{name}: {saved.get(name)!r}, now {self.settings.get(name)!r}" for name in other)
            raise StateError(
                f"{self.path} is the checkpoint of a run with other settings ({differences}); "
                "give the same settings to go on with it, or another --out"
            )
