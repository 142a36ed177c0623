"""Writes files and folders in one move: an error leaves nothing behind, and what a killed run left is removed by the next."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from glob import escape
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which neither locks files in this way nor opens folders
    fcntl = None  # type: ignore[assignment]

PART = ".part"
"""The ending of what is being written."""


def write_whole(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Write a file in one move, so that a half-written file is never seen, even after a power cut.

    Args:
        path: The file, in a folder that exists. A link is followed; a device or a pipe is written as it is.
        write: Writes the whole file to the path that it is given, a temporary one beside ``path``.
        previous: Where to keep the file that was there before, if anywhere.

    Raises:
        OSError: The file cannot be written; one that was there before is as it was.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        write(path)
        return
    with part_of(path) as part:
        write_synced(part, write)
        if previous is not None and path.exists():
            path.replace(previous)
        part.replace(path)
    sync_folder(path.parent)


def write_whole_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder in one move. One that was there before is replaced.

    Args:
        path: The folder, in a folder that exists.
        write: Writes all of it to the empty folder that it is given.

    Raises:
        OSError: The folder cannot be written; one that was there before is as it was.
    """
    with part_of(path) as part:
        part.mkdir()
        with held(part) if fcntl else nullcontext():
            made, before = part / "made", part / "before"
            made.mkdir()
            write(made)
            if path.exists():
                path.rename(before)
            try:
                made.rename(path)
            except OSError:
                if before.exists():
                    before.rename(path)
                raise
    sync_folder(path.parent)


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """Give a path beside another for what is being written; remove what is there at the end, and what killed runs left there."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    clear(path.parent, f"{escape(path.name)}.[0-9]*")
    try:
        yield part
    finally:
        remove(part)


def write_synced(part: Path, write: Callable[[Path], object]) -> None:
    """Write a file, locked, and see that it is on the disk."""
    with held(part, os.O_WRONLY | os.O_CREAT) as file:
        write(part)
        os.fsync(file)


@contextmanager
def held(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file or a folder and lock it, so that other runs see that it is being written."""
    file = os.open(path, flags, 0o666)
    try:
        if fcntl:
            with suppress(OSError):  # some network file systems know no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def clear(folder: Path, names: str = "*") -> None:
    """Remove what was being written in a folder when its run was killed. What another run is writing is locked, and stays.

    Args:
        folder: The folder.
        names: A pattern of what was being written.
    """
    for part in folder.glob(f".{names}{PART}"):
        with suppress(OSError):
            file = os.open(part, os.O_RDONLY)
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(part)
            finally:
                os.close(file)


def remove(part: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    if fcntl:
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def save(content: Any, path: Path) -> None:
    """Write what ``torch.save`` writes.

    Raises:
        OSError: The disk is full; ``torch.save`` tells this as a RuntimeError, in words of its own.
    """
    import torch  # here, since a help text needs none

    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
