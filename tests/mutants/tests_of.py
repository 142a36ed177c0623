"""Which tests run which line, and how long each takes: from one run of the tests of each folder under coverage."""

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from coverage import CoverageData

from tests.mutants.faults import Fault

NO_TESTS = 5
"""How pytest ends where all tests are left out, as those that need a GPU."""


@dataclass
class Coverage:
    """What one run of the tests told.

    Attributes:
        by_line: By file and line, the tests that run it.
        by_file: By file, the tests that run any of it; lines that run while it is imported have no tests of their own.
        seconds: By test, how long it took.
    """

    by_line: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    by_file: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=dict)

    def tests(self, fault: Fault, budget: float) -> list[str]:
        """Return the tests that meet a fault, those of its own package first, the quick before the slow.

        Args:
            fault: The fault.
            budget: How many seconds they may take together; the first test is always among them.
        """
        meeting: set[str] = set().union(*(self.by_line.get((fault.path, line), set()) for line in fault.lines))
        ordered = sorted(
            meeting or self.by_file.get(fault.path, set()),
            key=lambda test: (-nearness(test, fault.path), self.seconds.get(test, 1.0), test),
        )
        chosen: list[str] = []
        spent = 0.0
        for test in ordered:
            if chosen and spent + self.seconds.get(test, 1.0) > budget:
                continue
            chosen.append(test)
            spent += self.seconds.get(test, 1.0)
        return chosen

    def time(self, tests: Iterable[str]) -> float:
        """Return how many seconds tests take."""
        return sum(self.seconds.get(test, 1.0) for test in tests)


def nearness(test: str, path: str) -> int:
    """Return how many folders a test shares with a file: tests/runtime/ has the tests of dnifx/runtime/net/."""
    of_test, of_file = test.split("/")[1:-1], path.removeprefix("dnifx/").split("/")[:-1]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(of_test, of_file, strict=False)))


def areas(root: Path) -> list[str]:
    """Return the folders of a checkout that hold tests."""
    return sorted({str(path.parent.relative_to(root)) for path in (root / "tests").rglob("test_*.py")})


def measured(kept: Path, area: str) -> tuple[Path, Path]:
    """Return the two files that tell of the tests of a folder: which lines they run, and how long they take."""
    name = area.replace("/", ".")
    return kept / f"{name}.coverage", kept / f"{name}.xml"


def measure(root: Path, kept: Path, sources: Iterable[str], area: str) -> None:
    """Run the tests of a folder once under coverage in a checkout, and keep what they tell.

    Raises:
        RuntimeError: A test fails without any fault.
    """
    kept.mkdir(parents=True, exist_ok=True)
    lines, times = measured(kept, area)
    files = sorted(str(path.relative_to(root)) for path in (root / area).glob("test_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--cov-report=", "--cov-context=test"]
    command += [f"--cov={source}" for source in sources]
    running = lines.with_suffix(".running")
    ran = subprocess.run(
        [*command, f"--junitxml={times}", *files],
        cwd=root,
        env={**os.environ, "COVERAGE_FILE": str(running)},
        check=False,
    )
    if ran.returncode not in (0, NO_TESTS):
        raise RuntimeError(f"{area} fails without any fault: mend it first")
    running.replace(lines)


def read(kept: Path) -> Coverage:
    """Return what the tests that were measured told."""
    found = Coverage()
    for lines in kept.glob("*.coverage"):
        data = CoverageData(str(lines))
        data.read()
        for name in data.measured_files():
            path = name.removeprefix("dnifx/") if name.startswith("dnifx/passes/") else name
            for line, contexts in data.contexts_by_lineno(name).items():
                tests = {context.split("|")[0] for context in contexts if context}
                found.by_line[path, line] |= tests
                found.by_file[path] |= tests
        for case in xml.parse(lines.with_suffix(".xml")).iter("testcase"):
            module = case.get("classname", "").replace(".", "/") + ".py"
            found.seconds[f"{module}::{case.get('name')}"] = float(case.get("time", 1))
    return found
