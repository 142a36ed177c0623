"""Files of data sets: found in the data folder, checked, and downloaded if they are missing."""

import hashlib
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dnifx.errors import DataError
from dnifx.writing import write_whole


@dataclass(frozen=True)
class Resource:
    """A published file.

    Attributes:
        path: Its path in the data folder.
        md5: The hash of its bytes.
        url: Its address; empty if it is in an archive.
        archive: The archive that holds it; None if it is published by itself.
    """

    path: str
    md5: str
    url: str = ""
    archive: "Resource | None" = None


def data_folder() -> Path:
    """Return the folder of the data sets: ``$DNIFX_DATA``, or ``~/.cache/dnifx``."""
    return Path(os.environ.get("DNIFX_DATA") or Path.home() / ".cache" / "dnifx")


def find(resource: Resource) -> Path:
    """Return the path of a file. A missing file is downloaded, with a progress bar.

    Raises:
        DataError: The file is damaged, or it is missing and cannot be downloaded.
    """
    path = data_folder() / resource.path
    if not path.exists():
        _download(resource, path)
    got = _md5(path)
    if got != resource.md5:
        raise DataError(
            f"{path} is damaged: its md5 is {got}, expected {resource.md5}; remove the file and run again to download "
            "it, or put the published file there"
        )
    return path


def _download(resource: Resource, path: Path) -> None:
    if resource.archive is None:
        _retrieve(resource, path)
        return
    archive = find(resource.archive)
    member = path.relative_to(archive.parent).as_posix()
    with tarfile.open(archive) as files:
        source = files.extractfile(member) if member in files.getnames() else None
        if source is None:
            raise DataError(f"{archive} holds no file {member}; put the published file at {path}")

        def copy(part: Path) -> None:
            with part.open("wb") as target:
                shutil.copyfileobj(source, target)

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, copy)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {error.strerror or error}; make room, or set DNIFX_DATA to another folder"
            ) from error


def _retrieve(resource: Resource, path: Path) -> None:
    try:
        import pooch
    except ImportError as error:
        raise DataError(
            f"{path} is missing, and pooch, which downloads it, is not installed: pip install 'dnifx[zoo]'"
        ) from error

    def download(part: Path) -> None:
        with part.open("wb") as target, _Bar(path.name) as bar:
            pooch.HTTPDownloader(progressbar=bar, timeout=30)(resource.url, target, None)
        got = _md5(part)
        if got != resource.md5:
            raise ValueError(f"what came has the hash {got}")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, download)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is missing and could not be downloaded from {resource.url}: {error}; connect to the network, or "
            f"put the published file there (md5 {resource.md5}), or set DNIFX_DATA to the folder that holds it"
        ) from error


class _Bar:
    """A progress bar with the methods that pooch calls."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(name, total=None)
        self.total = 0

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, count: int) -> None:
        """Add ``count`` bytes."""
        self.progress.update(self.task, total=self.total or None, advance=count)

    def reset(self) -> None:
        """Go back to no byte."""
        self.progress.update(self.task, completed=0)

    def close(self) -> None:
        """Do nothing: the context manager closes the bar."""


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
