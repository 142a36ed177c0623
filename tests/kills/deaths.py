"""The ways in which a run ends before its time: a signal at some moment, in a call that writes or in a write, or a full disk."""

import fcntl
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

WRITING = ((os, "mkdir"), (fcntl, "flock"), (os, "fsync"), (os, "replace"), (os, "unlink"))
"""The calls by which a run writes its files, beside the writes themselves."""

ERROR = 2
INTERRUPTED = (1, 130)
SAVED = 143
"""How a command ends: with an error that is told in one line, after Ctrl-C, and after a SIGTERM that found it training."""


def nothing(*_: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Death:
    """A way in which a run may end before its time.

    Attributes:
        kind: What it has in common with others, in words.
        words: What it is.
        fits: Whether a process ended in this way, from its exit code (the negative number of the signal that ended it) and
            what it wrote to the standard error.
        arm: Prepares it, in the process that is going to end.
        strike: Does it, from the process that watches, which gives the number of the other.
        relieve: Takes away what keeps the next process from running.
    """

    kind: str
    words: str
    fits: Callable[[int, str], bool]
    arm: Callable[[], None] = nothing
    strike: Callable[[int], None] = nothing
    relieve: Callable[[], None] = nothing

    def __str__(self) -> str:
        return self.words


def after_time(sent: signal.Signals, seconds: float) -> Death:
    """Return the death by a signal at any moment.

    Args:
        sent: The signal.
        seconds: When.
    """

    def strike(process: int) -> None:
        time.sleep(seconds)
        os.kill(process, sent)

    name = sent.name
    return Death(f"{name} at a moment", f"{name} after {seconds:.3f} s", partial(by_signal, sent), strike=strike)


def at_call(sent: signal.Signals, number: int, after: bool) -> Death:
    """Return the death by a signal right before or after a call that writes.

    Args:
        sent: The signal.
        number: Which call, counted from 0.
        after: Whether the call is still made.
    """

    def call(count: int, own: Callable[[], Any]) -> Any:
        if count == number and not after:
            os.kill(os.getpid(), sent)
        try:
            return own()
        finally:
            if count == number and after:
                os.kill(os.getpid(), sent)

    words = f"{sent.name} {'after' if after else 'before'} writing call {number}"
    return Death(f"{sent.name} at a call that writes", words, partial(by_signal, sent), partial(on_writing, call))


def in_write(number: int, size: int, kills: bool) -> Death:
    """Return the death in a write: the system ends the process, or refuses the write, where a file grows beyond a size.

    Args:
        number: From which writing call on.
        size: The size, in bytes.
        kills: Whether the process is killed. If not, the write fails, as on a full disk.
    """

    def call(count: int, own: Callable[[], Any]) -> Any:
        if count == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return own()

    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        on_writing(call)

    words = f"{'killed' if kills else 'refused'} at byte {size} of a file, from writing call {number}"
    fits = partial(by_signal, signal.SIGXFSZ) if kills else told
    return Death("killed in a write" if kills else "a write refused", words, fits, arm)


def full_disk(disk: Path, room: int) -> Death:
    """Return the death on a file system without room for all.

    Args:
        disk: A folder of the file system, which is small.
        room: How many bytes are free.
    """
    ballast = disk / "ballast"

    def arm() -> None:
        state = os.statvfs(disk)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(state.f_bavail * state.f_frsize - room, 1))

    def relieve() -> None:
        ballast.unlink(missing_ok=True)

    return Death("full disk", f"a disk with {room} bytes free", told, arm, relieve=relieve)


def on_writing(call: Callable[[int, Callable[[], Any]], Any]) -> None:
    """Let a function make all calls that write, from now on: it is given the number of each and the call itself."""
    count = 0

    def counted(own: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            number, count = count, count + 1
            return call(number, lambda: own(*args, **kwargs))

        return replacement

    for module, name in WRITING:
        setattr(module, name, counted(getattr(module, name)))


def by_signal(sent: signal.Signals, status: int, errors: str) -> bool:
    """Whether a signal ended a process; Ctrl-C without a traceback."""
    if sent is signal.SIGINT:
        in_torch = status == -signal.SIGABRT and "python_error" in errors  # Ctrl-C met C++ code, which ends the process
        return (status in INTERRUPTED and "Traceback" not in errors) or in_torch
    saved = sent is signal.SIGTERM and status == SAVED and not errors
    return status == -sent or saved


def told(status: int, errors: str) -> bool:
    """Whether a command ended with an error of one line about its folder."""
    return status == ERROR and len(errors.splitlines()) == 1 and "cannot be written" in errors
