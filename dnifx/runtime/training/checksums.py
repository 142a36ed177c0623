"""The checksums of a save, in a file that ``sha256sum -c`` reads too: a bit that flips on the disk is found."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "SHA256SUMS"
"""The file that has them, beside those that it tells of."""


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """Return the checksums of files by their names."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the checksums of a folder's files, and see that they are on the disk."""
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.writelines(f"{known[name]}  {name}\n" for name in sorted(known))
        file.flush()
        os.fsync(file.fileno())


def refuse_damaged(folder: Path) -> None:
    """Raise ValueError where a file of a folder is not what its checksum was made of. A folder without checksums is taken as it is.

    Raises:
        OSError: A file that has a checksum cannot be read.
    """
    if not (folder / NAME).exists():
        return
    for line in (folder / NAME).read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        if checksums([folder / name])[name] != expected:
            raise ValueError(f"{name} is damaged: its content is not that of its checksum")
