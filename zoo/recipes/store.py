"""Checkpoints to resume from: two generations, each with a checksum."""

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dnifx.errors import DnifxWarning, StateError
from dnifx.writing import save
from dnifx.zoo.recipes.outputs import write_whole

FORMAT = 1

SEAL = b"\ndnifx sha256 "
"""What stands between the content of a checkpoint and its checksum, at the end of the file."""

RENAMED = {"arm": "variant"}
"""Settings that had another name in older checkpoints, and their present name."""


def _anything(settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Allow every state."""


@dataclass(frozen=True)
class Checkpoint:
    """The file that holds the state of one training run.

    Attributes:
        path: The file.
        settings: The settings that the run depends on, by name. A run with others cannot resume.
        free: Settings that may change. They are saved too.
        allow: Called with the saved settings and the saved state; raises a ``StateError`` where they do not go together
            with what is asked now.
    """

    path: Path
    settings: Mapping[str, Any]
    free: Collection[str] = ()
    allow: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = _anything

    @property
    def previous(self) -> Path:
        """The file of the generation before."""
        return self.path.with_name(f"{self.path.name}.previous")

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``state``, a tree of tensors, numbers, strings, lists and dicts, and keep the state before as ``previous``.

        Raises:
            OptionError: It cannot be written; the last checkpoint is as it was.
        """
        content = {"format": FORMAT, "settings": dict(self.settings), "state": dict(state)}

        def write(part: Path) -> None:
            save(content, part)
            seal(part)

        write_whole(self.path, write, self.previous)

    def load(self) -> Mapping[str, Any] | None:
        """Return the last saved state that is whole, or None if there is none; warn where the last one is damaged.

        Raises:
            StateError: The file is not a checkpoint, or belongs to a run with other settings.
        """
        found = [path for path in (self.path, self.previous) if path.exists()]
        for path in found:
            try:
                content = read(path)
            except StateError as error:
                if path == found[-1]:
                    raise StateError(f"{error}; remove it to start again") from error
                warnings.warn(f"{error}; the run resumes from the checkpoint before it", DnifxWarning, stacklevel=2)
                continue
            self._check(content)
            state: Mapping[str, Any] = content["state"]
            return state
        return None

    def _check(self, content: Any) -> None:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StateError(f"{self.path} is not a checkpoint of format {FORMAT}; remove it, or give another --out")
        saved = {RENAMED.get(name, name): value for name, value in content["settings"].items()}
        names = sorted({*saved, *self.settings}.difference(self.free))
        other = [name for name in names if saved.get(name) != self.settings.get(name)]
        if other:
            differences = ", ".join(f"{name}: {saved.get(name)!r}, now {self.settings.get(name)!r}" for name in other)
            raise StateError(
                f"{self.path} is the checkpoint of a run with other settings ({differences}); "
                "give the same settings to resume it, or another --out"
            )
        self.allow(saved, content["state"])


def seal(path: Path) -> None:
    """Append the checksum of a file to it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with path.open("ab") as file:
        file.write(SEAL + digest.encode())


def is_sealed(path: Path) -> bool:
    """Whether a file has the content that its checksum was made of. Older checkpoints have no checksum and are taken as they are."""
    body = path.stat().st_size - len(SEAL) - 2 * hashlib.sha256().digest_size
    with path.open("rb") as file:
        file.seek(max(body, 0))
        mark, _, digest = file.read().rpartition(b" ")
        if mark + b" " != SEAL:
            return True
        file.seek(0)
        own = hashlib.sha256()
        while body > 0:
            block = file.read(min(body, 1 << 20))
            own.update(block)
            body -= len(block)
    return own.hexdigest().encode() == digest


def read(path: Path) -> Any:
    """Return what a checkpoint holds.

    Raises:
        StateError: It cannot be read, or it is damaged.
    """
    try:
        if not is_sealed(path):
            raise ValueError("it is damaged: its content is not that of its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, UnpicklingError) as error:
        raise StateError(f"{path} cannot be read as a checkpoint: {error}") from error


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
    depends = {key: value for key, value in asdict(options).items() if key not in {*apart, "out", "log_dir"}}
    return Checkpoint(options.out / "checkpoints" / f"{name}.pt", {**depends, **own})
