"""The folder of a run's output: found fit before the run starts, written whole, cleared of what a killed run left."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dnifx import writing
from dnifx.errors import OptionError

ROOM = 1 << 16
"""Bytes that have to fit into a folder before a run starts."""


def prepare(out: Path | None) -> None:
    """Make an output folder, if one was given, remove what a killed run left there, and see that it can be written to.

    Raises:
        OptionError: It is a file, or it cannot be written to.
    """
    if out is None:
        return
    if os.path.exists(out) and not os.path.isdir(out):
        raise OptionError(f"--out {out} is a file; name a folder, which is made if it does not exist")
    with told(out):
        for folder in (out, out / "checkpoints"):
            writing.clear(folder)
        out.mkdir(parents=True, exist_ok=True)
        with writing.part_of(out / "trial") as part:
            writing.write_synced(part, lambda part: part.write_bytes(bytes(ROOM)))


def write_whole(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Write a file in one move, in a folder that is made if it does not exist: ``dnifx.writing.write_whole``.

    Raises:
        OptionError: The file cannot be written; one that was there before is as it was.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        writing.write_whole(path, write, previous)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise OptionError where the system says that a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"--out: {path} cannot be written: {error.strerror or error}. What was there before is whole; make room, or name a folder "
            "that can be written to"
        ) from error
