"""The folder of a run's output: found fit before the run starts, written whole, cleared of what a killed run left."""

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dnifx.errors import OptionError

PART = ".part"
"""The ending of a file that is being written."""

ROOM = 1 << 16
"""Bytes that have to fit into a folder before a run starts."""


def prepare(out: Path | None) -> None:
    """Make an output folder, if one was given, see that it can be written to, and remove what a killed run left there.

    Raises:
        OptionError: It is a file, or it cannot be written to.
    """
    if out is None:
        return
    if os.path.exists(out) and not os.path.isdir(out):
        raise OptionError(f"--out {out} is a file; name a folder, which is made if it does not exist")
    trial = out / f".trial{PART}"  # a name that the next run clears, should this one be killed here
    write_whole(trial, lambda part: part.write_bytes(bytes(ROOM)))
    trial.unlink(missing_ok=True)
    for folder in (out, out / "checkpoints"):
        clear(folder)


def clear(folder: Path) -> None:
    """Remove the files in a folder that were being written when their run was killed. A file that a run is writing is locked."""
    for part in folder.glob(f".*{PART}"):
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def write_whole(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Write a file in one move, so that a half-written file is never seen, even after a power cut.

    Args:
        path: The file. Its folder is created if it does not exist.
        write: Writes the whole file to the path that it is given, a temporary one beside ``path``.
        previous: Where to keep the file that was there before, if anywhere.

    Raises:
        OptionError: The file cannot be written; one that was there before is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as held:
                with suppress(OSError):  # some network file systems know no locks
                    fcntl.flock(held, fcntl.LOCK_EX)
                write(part)
                os.fsync(held.fileno())
            if previous is not None and path.exists():
                path.replace(previous)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise OptionError(
            f"--out: {path} cannot be written: {error.strerror or error}. What was there before is whole; make room, or name a folder "
            "that can be written to"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    held = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
