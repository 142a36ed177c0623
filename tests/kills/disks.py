"""A small file system in memory, where mounting one is allowed."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 4 << 20
"""Bytes of a small file system."""


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system on a folder; give False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = called("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            called("umount", str(folder))


def called(*words: str) -> bool:
    """Whether a command can be called and succeeds."""
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
