"""A race from the command line: options, a table of rates and ratios, and figures as JSON."""

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
    """Races between contestants, and how to show them.

    Attributes:
        name: Name of the benchmark.
        unit: The unit of the rates, such as ``steps``.
        heats: For each race, by its title, a function that makes the contestants on a device.
        bases: The contestants that all others are compared with.
    """

    name: str
    unit: str
    heats: Mapping[str, Callable[[torch.device], Contestants]]
    bases: tuple[str, ...]

    def table(self, title: str, timing: Timing) -> Table:
        """Return rates and ratios as a table."""
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
        description: The text of ``--help``.
        rounds: Default of ``--rounds``.
        steps: Default of ``--steps``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="steps in a turn (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
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
