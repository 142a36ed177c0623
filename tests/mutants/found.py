"""Which faults the tests have found already: a run that was stopped goes on, and one after new tests tries the survivors again."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.mutants.faults import Fault
from tests.mutants.trial import Outcome


@cache
def digest(path: Path) -> str:
    """Return a checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """The faults that were found, a line of JSON for each.

    Attributes:
        root: The checkout.
        path: Where they are kept. A fault of a file that has changed since counts as one that was never tried.
    """

    root: Path
    path: Path

    def key(self, fault: Fault) -> list[str | int]:
        """Return what tells a fault from all others."""
        return [fault.path, digest(self.root / fault.path), fault.number]

    def outcome(self, fault: Fault) -> Outcome | None:
        """Return what became of a fault that was found, else None."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for key, result, by in map(json.loads, lines):
            if key == self.key(fault):
                return Outcome(fault, result, by)
        return None

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, if the fault was found."""
        if outcome.result in ("killed", "late"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([self.key(outcome.fault), outcome.result, outcome.by]) + "\n")
