"""Breaks the code, one small fault at a time: ``python -m tests.mutants --count 100``.

Each fault changes one operator, number, condition or statement. The tests that run its line are run on a copy of the checkout.
A fault that they do not find is a survivor: a test is missing, or the fault changes nothing (``equivalent.txt`` says why).
"""

import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from tests.mutants.faults import Fault, faults
from tests.mutants.found import Found
from tests.mutants.tests_of import Coverage, areas, measure, measured, read
from tests.mutants.trial import Outcome, attempt, check_whole, copied

ROOT = Path(__file__).parents[2]
SOURCES = ("passes", "dnifx/ir", "dnifx/runtime", "dnifx/schedules")
EQUIVALENT = Path(__file__).with_name("equivalent.txt")


def main(
    count: Annotated[int, typer.Option(help="How many faults, drawn at random.")] = 100,
    seed: Annotated[int, typer.Option(help="Which.")] = 0,
    below: Annotated[list[str] | None, typer.Option(help="Only in files that begin so, such as passes/cuts.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds of tests for each fault.")] = 30.0,
    again: Annotated[float, typer.Option(help="Seconds of tests in all for one that those do not find.")] = 300.0,
    processes: Annotated[int, typer.Option(help="How many faults are tried at the same time.")] = 2,
    kept: Annotated[Path, typer.Option(help="Where the coverage of the suite, and what was found, is kept.")] = ROOT
    / ".mutants",
    area: Annotated[
        list[str] | None, typer.Option(help="Measure only tests of these folders: tests/passes/cuts.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Measure the coverage anew, and try all faults again.")] = False,
    goal: Annotated[float, typer.Option(help="Exit with 1 where a smaller share is found.")] = 0.95,
) -> None:
    """Put faults into the code and tell which the tests do not find."""
    console = Console()
    for tests in area or areas(ROOT):
        if fresh or not measured(kept, tests)[0].exists():
            console.print(f"running {tests} once under coverage")
            measure(ROOT, kept, ("dnifx", "passes"), tests)
    coverage = read(kept)
    drawn = draw(count, seed, tuple(below or SOURCES))
    if fresh:
        (kept / "found.jsonl").unlink(missing_ok=True)
    found = Found(ROOT, kept / "found.jsonl")
    outcomes = try_all(drawn, coverage, found, (budget, again), processes, console)
    excused = equivalents()
    survivors = [each for each in outcomes if each.result in ("survived", "unmet")]
    for each in survivors:
        reason = excused.get(line_of(each.fault))
        console.print(
            f"{each.result} ({each.by}): {each.fault}" + (f"  equivalent: {reason}" if reason else ""), markup=False
        )
    real = [each for each in survivors if line_of(each.fault) not in excused]
    share = 1 - len(real) / max(len(outcomes), 1)
    console.print(
        f"{dict(Counter(each.result for each in outcomes))}, {len(survivors) - len(real)} of these equivalent"
    )
    console.print(f"found or equivalent: {share:.1%} of {len(outcomes)} (seed {seed})")
    sys.exit(share < goal)


def draw(count: int, seed: int, below: tuple[str, ...]) -> list[Fault]:
    """Return faults drawn evenly from all that can be put into the files below some folders."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [path for path in listed.splitlines() if path.startswith(below)]
    every = [fault for path in sorted(files) for fault in faults(ROOT, path)]
    return random.Random(seed).sample(every, min(count, len(every)))


def try_all(
    drawn: list[Fault],
    coverage: Coverage,
    found: Found,
    budgets: tuple[float, float],
    processes: int,
    console: Console,
) -> list[Outcome]:
    """Try faults, several at the same time, each in a copy of the checkout of its own.

    Args:
        drawn: The faults.
        coverage: Which tests run which line.
        found: The faults that were found before, which are not tried again.
        budgets: Seconds of tests for each fault, and in all for one that those do not find.
        processes: How many faults are tried at the same time.
        console: Tells what becomes of each.
    """
    copies: SimpleQueue[Path] = SimpleQueue()

    def one(fault: Fault) -> Outcome:
        before = found.outcome(fault)
        if before is not None:
            return before
        first, more = (coverage.tests(fault, budget) for budget in budgets)
        copy = copies.get()
        try:
            outcome = attempt(copy, fault, first, coverage.time(first))
            rest = [test for test in more if test not in first]
            return attempt(copy, fault, rest, coverage.time(rest)) if outcome.result == "survived" and rest else outcome
        finally:
            copies.put(copy)

    first = next((tests for fault in drawn if (tests := coverage.tests(fault, 0.0))), [])
    with ExitStack() as stack, ThreadPoolExecutor(processes) as pool:
        for _ in range(processes):
            copy = stack.enter_context(copied(ROOT))
            check_whole(copy, first)
            copies.put(copy)
        outcomes = []
        for outcome in track(pool.map(one, drawn), "faults", len(drawn), console=console):
            outcomes.append(outcome)
            if found.outcome(outcome.fault) is None:
                found.add(outcome)
            console.print(f"{outcome.result:9} {outcome.fault}  [{outcome.by}]", markup=False, highlight=False)
        return outcomes


def line_of(fault: Fault) -> str:
    """Return how a fault is named in the list of those that change nothing: its file, its line of code, and the change."""
    code = (ROOT / fault.path).read_text(encoding="utf-8").splitlines()[fault.lines[-1] - 1].strip()
    return f"{fault.path}: {code}: {fault.before} -> {fault.after}"


def equivalents() -> dict[str, str]:
    """Return the faults that change nothing a test could find, with the reason."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines()
    parts = [line.rpartition("  # ") for line in lines if line]
    return {name: reason for name, _, reason in parts}


if __name__ == "__main__":
    typer.run(main)
