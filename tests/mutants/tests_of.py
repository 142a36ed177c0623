"""Which tests run which line, and how long each takes: from one run of the suite under coverage."""

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


@dataclass
class Coverage:
    """What one run of the suite told.

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


def nearness(test: str, path: str) -> int:
    """Return how many folders a test shares with a file: tests/runtime/ has the tests of dnifx/runtime/net/."""
    of_test, of_file = test.split("/")[1:-1], path.removeprefix("dnifx/").split("/")[:-1]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(of_test, of_file, strict=False)))


def measure(root: Path, kept: Path, sources: Iterable[str], processes: int) -> None:
    """Run the suite once under coverage in a checkout, and keep what it tells in a folder.

    Raises:
        RuntimeError: A test fails without any fault.
    """
    kept.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "-p", "no:cacheprovider", "--cov-report="]
    command += [f"--cov={source}" for source in sources]
    command += ["--cov-context=test", f"--junitxml={kept / 'times.xml'}"]
    ran = subprocess.run(command, cwd=root, check=False)
    if ran.returncode:
        raise RuntimeError("the suite fails without any fault: mend it first")
    (root / ".coverage").replace(kept / "coverage")


def read(kept: Path) -> Coverage:
    """Return what a run of the suite told."""
    found = Coverage()
    data = CoverageData(str(kept / "coverage"))
    data.read()
    for name in data.measured_files():
        path = name.removeprefix("dnifx/") if name.startswith("dnifx/passes/") else name
        for line, contexts in data.contexts_by_lineno(name).items():
            tests = {context.split("|")[0] for context in contexts if context}
            found.by_line[path, line] |= tests
            found.by_file[path] |= tests
    for case in xml.parse(kept / "times.xml").iter("testcase"):
        module = case.get("classname", "").replace(".", "/") + ".py"
        found.seconds[f"{module}::{case.get('name')}"] = float(case.get("time", 1))
    return found
