"""One step at a time, and what a step had updated where it breaks off."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from dnifx.errors import InputError, StateError

MOST_NAMES = 6
"""How many names a note lists."""


class Named(Protocol):
    """What is updated."""

    name: str


class Turn:
    """Lets one step of a trainer run at a time, and notes what it has updated.

    Attributes:
        updated: What the step has updated so far.
        under_way: What it is updating.
    """

    def __init__(self) -> None:
        self.updated: list[str] = []
        self.under_way: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep others out.

        Raises:
            StateError: A step is running.
        """
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "this trainer is in the middle of a step, in another thread or in a function that the step has called. Steps of one "
                "trainer run one after the other: let one thread call it, or make a net and a trainer for each"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def step(self, number: int, updates: Iterable[Named]) -> Iterator[None]:
        """Keep others out for a step; where it breaks off, note in the error what of all updates it had made.

        Raises:
            StateError: A step is running.
        """
        refuse_inference()
        with self.taken():
            self.updated, self.under_way = [], []
            try:
                yield
            except BaseException as error:
                error.add_note(self.note(number, [each.name for each in updates]))
                raise

    def begin(self, *names: str) -> None:
        """Note that something is being updated."""
        self.under_way += names

    def end(self, *names: str) -> None:
        """Note that it is updated."""
        self.under_way = [each for each in self.under_way if each not in names]
        self.updated += names

    def note(self, number: int, names: Iterable[str]) -> str:
        """Return what a step that broke off had updated."""
        if not self.updated and not self.under_way:
            return f"step {number} broke off before it had updated anything; the next step goes on"
        half = f" In the middle of its update: {listed(self.under_way)}." if self.under_way else ""
        rest = [name for name in names if name not in self.updated and name not in self.under_way]
        return (
            f"step {number} broke off. Updated: {listed(self.updated)}.{half} Not updated: {listed(rest)}. The next step goes on from "
            "these weights; trainer.load_state_dict goes back to a saved state"
        )

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        """A copy begins free."""
        return Turn, ()


def refuse_inference() -> None:
    """Raise InputError under ``torch.inference_mode()``, where nothing can be differentiated."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "this is called under torch.inference_mode(), where nothing can be differentiated: call it outside, or under torch.no_grad()"
        )


def listed(names: Iterable[str]) -> str:
    """Return names as text, the first few of many."""
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return ", ".join(known[:MOST_NAMES]) + more or "nothing"
