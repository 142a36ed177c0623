"""Putting one fault into a copy of the checkout and running the tests that meet it."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.faults import Fault, broken

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "build", "results", "*.egg-info", ".hypothesis", ".*_cache"
)
USAGE = 4
"""How pytest ends where it is called in a wrong way."""
STARTING = 90.0
"""How many seconds a process may take beside its tests: it imports torch and collects."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
        fault: The fault.
        result: ``"killed"``, ``"late"`` (the tests took too long, which finds it too), ``"survived"`` or ``"unmet"`` (no
            test runs its line).
        by: The test that found it, or how many tests did not.
    """

    fault: Fault
    result: str
    by: str


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """Give a copy of a checkout to break."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(root, copy, symlinks=True, ignore=LEFT_OUT)
        yield copy


def attempt(copy: Path, fault: Fault, tests: list[str], seconds: float) -> Outcome:
    """Run tests with a fault in a copy of the checkout, which is whole again afterwards.

    Args:
        copy: The copy.
        fault: The fault.
        tests: Which tests, in this order.
        seconds: How long they take without a fault.

    Raises:
        RuntimeError: Pytest does not find the tests.
    """
    if not tests:
        return Outcome(fault, "unmet", "no test")
    path = copy / fault.path
    before = path.read_text(encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *tests,
    ]
    around = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        path.write_text(broken(copy, fault), encoding="utf-8")
        ran = subprocess.run(
            command, cwd=copy, env=around, capture_output=True, text=True, timeout=STARTING + 4 * seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(fault, "late", "the time limit")
    finally:
        path.write_text(before, encoding="utf-8")
    if ran.returncode == 0:
        return Outcome(fault, "survived", f"{len(tests)} tests")
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if ran.returncode == USAGE and "not found" in ran.stdout + ran.stderr:
        raise RuntimeError(f"pytest does not find the tests; measure again with --fresh: {ran.stderr[-500:]}")
    return Outcome(fault, "killed", failed[0].split(" - ")[0] if failed else "a fault while the tests were collected")
