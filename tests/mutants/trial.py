"""Putting one fault into a copy of the checkout and running the tests that meet it."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.mutants.faults import Fault, broken

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "build", "results", ".mutants", "runs", "*.egg-info", ".hypothesis", ".*_cache"
)
USAGE = 4
"""How pytest ends where it is called in a wrong way."""
STARTING = 180.0
"""How many seconds a process may take beside its tests: it imports dnifx and collects."""
ROOT = Path(__file__).parents[2]
FORKS = get_context("forkserver")
"""Makes the processes that run tests: copies of one that has imported what takes long and is never broken."""
PRELOADED = [
    *(
        "torch",
        "torch.export",
        "torch.fx.experimental.symbolic_shapes",
        "torch._subclasses.fake_tensor",
        "torch.testing",
    ),
    *("pytest", "hypothesis", "_pytest.assertion.rewrite", "networkx", "rich.console", "typer"),
]


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
        tests: Which tests, in this order. Those that are gone since they were measured are left out.
        seconds: How long they take without a fault.
    """
    path = copy / fault.path
    before = path.read_text(encoding="utf-8")
    code: int | None = USAGE
    try:
        path.write_text(broken(copy, fault), encoding="utf-8")
        while tests and code == USAGE:
            code, text = called(copy, tests, STARTING + 4 * seconds)
            there = [test for test in tests if f"{copy}/{test}" not in text]
            if len(there) == len(tests):
                break
            tests = there
    finally:
        path.write_text(before, encoding="utf-8")
    if not tests:
        return Outcome(fault, "unmet", "no test")
    if code is None:
        return Outcome(fault, "late", "the time limit")
    if code == 0:
        return Outcome(fault, "survived", f"{len(tests)} tests")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome(fault, "killed", failed[0].split(" - ")[0] if failed else "a fault while the tests were collected")


def check_whole(copy: Path, tests: list[str]) -> None:
    """Call pytest without a fault.

    Raises:
        RuntimeError: A test fails.
    """
    code, text = called(copy, tests, STARTING)
    if code != 0:
        raise RuntimeError(f"{', '.join(tests)} fails without any fault: {text[-2000:]}")


def called(copy: Path, tests: list[str], limit: float) -> tuple[int | None, str]:
    """Call pytest in a process that has imported torch already.

    Returns:
        Its exit code, None where it took longer than the limit, and what it printed.
    """
    FORKS.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile("r", errors="replace") as printed:
        process = FORKS.Process(target=call_pytest, args=(str(copy), tests, printed.name))
        process.start()
        process.join(limit)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        return code, printed.read()


def call_pytest(copy: str, tests: list[str], printed: str) -> None:
    """Call pytest in this process, on the modules of a copy of the checkout."""
    with open(printed, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy
    sys.path[:] = [copy, *(each for each in sys.path if each not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True
    import pytest

    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    sys.exit(int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", *quiet, *tests])))
