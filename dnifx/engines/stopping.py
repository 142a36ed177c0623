"""How a signal stops a run: the step that runs is finished. Over ranks, a signal to one rank stops all after the same step."""

import signal
import threading
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dnifx.errors import StateError

PAUSE = 0.1
"""Seconds between two looks at whether another rank was sent a signal."""

KILLED = 128
"""What the exit code of a script is, beside the number of the signal that ended it."""


class Signals:
    """Takes note of signals to this process, in place of what they did before, so that a loop can stop between two steps.

    Attributes:
        received: The number of the last one; 0 where none came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def listen(self, numbers: Sequence[int]) -> None:
        """Take note of more signals from now on.

        Raises:
            StateError: This is not the main thread, to which Python gives signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise StateError("Python handles signals in the main thread alone: call save_on_signal there")
        for number in numbers:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._take)

    def _take(self, number: int, frame: Any) -> None:
        self.received = number

    def taken(self) -> int:
        """Return the number of the signal that came, which is then dealt with; 0 where none came."""
        number, self.received = self.received, 0
        return number

    def close(self) -> None:
        """Let signals do what they did before."""
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
            self._before = {}

    def pass_on(self) -> None:
        """Let signals do what they did before, one too that came and was not dealt with."""
        self.close()
        if number := self.taken():
            signal.raise_signal(number)

    def __reduce__(self) -> tuple[type["Signals"], tuple[()]]:
        """A copy listens to nothing."""
        return Signals, ()


class Agreement:
    """All ranks agree after which step they stop, once a signal has come to one of them. Until then nobody waits.

    A thread of each rank sees the signal. The ranks tell each other, on a process group of its own, after which step each can stop
    at the earliest; the last of these it is. Where a rank is ready, it waits for the answers alone, and not for the others' steps.

    Args:
        signals: Those to this process.
        store: Where a rank tells the others that it got one.
        group: The process group.
        steps: How many steps are done.
    """

    def __init__(self, signals: Signals, store: Store, group: dist.ProcessGroup, steps: int) -> None:
        self.signals, self.store, self.group = signals, store, group
        self._state, self._over = threading.Condition(), threading.Event()
        self._next, self._told = steps + 1, -1
        self._last, self._signal = -1, 0
        self._lost: RuntimeError | None = None
        self._thread = threading.Thread(target=self._watch, name="dnifx signals", daemon=True)
        self._thread.start()

    def after(self, steps: int) -> int:
        """Return the signal after which all ranks stop with so many steps done; 0 where they go on.

        Raises:
            RuntimeError: A rank is gone.
        """
        with self._state:
            while self._told == steps and self._last < 0 and self._lost is None:
                self._state.wait(PAUSE)
            if self._lost is not None:
                raise self._lost
            self._next = steps + 1
            return self._signal if self._last == steps else 0

    def close(self) -> None:
        """End the thread, so that it is not in the middle of a call when Python ends."""
        self._over.set()
        self._thread.join(PAUSE * 50)

    def _watch(self) -> None:
        while not self._over.wait(PAUSE):
            try:
                if self.signals.received or self.store.check(["stop"]):
                    self._agree()
                    return
            except (
                RuntimeError,
                ValueError,
            ) as error:  # a rank is gone, or the process that keeps the store, or the group
                with self._state:
                    self._lost = RuntimeError(str(error))
                    self._state.notify_all()
                return

    def _agree(self) -> None:
        self.store.set("stop", "")
        with self._state:
            self._told = self._next
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, (self._told, self.signals.received), self.group)
        with self._state:
            self._last = max(steps for steps, _ in found)
            self._signal = next(number for _, number in found if number)
            self._state.notify_all()
