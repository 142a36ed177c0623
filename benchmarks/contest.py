"""A race from the command line: options, a table with each contestant's ratio to others, figures as JSON."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Timing, as_json, machine, race, waiter

Contestants = Mapping[str, Callable[[], None]]


@dataclass(frozen=True)
class Contest:
    """What is raced, and how it is shown.

    Attributes:
        name: Of the benchmark.
        unit: What is counted: ``steps``.
        heats: Titles of the races, each with what makes its contestants on a device.
        bases: Contestants that all others are compared with.
    """

    name: str
    unit: str
    heats: Mapping[str, Callable[[torch.device], Contestants]]
    bases: tuple[str, ...]

    def table(self, title: str, timing: Timing) -> Table:
        """Show rates and ratios."""
        shown = Table("contestant", f"{self.unit}/s", *(f"to {base}" for base in self.bases), title=title)
        for name in timing.rates:
            ratios = [f"{timing.ratio(name, base):.3f}" for base in self.bases]
            shown.add_row(name, f"{timing.median(name):.1f}", *ratios)
        return shown

    def figures(self, timing: Timing) -> dict[str, dict[str, float]]:
        """Return rates and ratios for JSON."""
        return {
            name: {
                f"{self.unit}_per_second": timing.median(name),
                **{f"to_{base.replace(' ', '_')}": timing.ratio(name, base) for base in self.bases},
            }
            for name in timing.rates
        }


def run(contest: Contest, description: str | None, rounds: int, steps: int) -> None:
    """Run a contest with the options of the command line.

    Args:
        contest: The contest.
        description: What ``--help`` says.
        rounds: Turns of each contestant by default.
        steps: Steps in a turn by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    figures = {}
    for title, make in contest.heats.items():
        timing = race(make(device), options.rounds, options.steps, waiter(device))
        console.print(contest.table(title, timing))
        figures[title] = contest.figures(timing)
    if options.json:
        options.json.write_text(as_json(contest.name, device, figures) + "\n")
