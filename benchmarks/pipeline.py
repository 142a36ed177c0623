"""The time of each compiler pass on chains of Linear and ReLU pairs of two lengths.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --rounds 5 --json pipeline.json

It compiles 500 pairs and 5,000 pairs, 8 features wide with 50 cuts, three times each. It prints the
microseconds that each pass takes for a node, and their ratio between the two lengths. A ratio of 1
means that the pass takes linear time.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dnifx
from benchmarks.timing import as_json, machine
from dnifx.passes.pipeline import Event

SIZES = (500, 5000)
WIDTH = 8


def chain(pairs: int) -> nn.Sequential:
    """Return pairs of a linear layer and a ReLU, 8 features wide."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(pairs):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers)


def seconds_by_pass(pairs: int, cuts: int = 50, verify: bool = True) -> dict[str, float]:
    """Compile a chain into ``cuts + 1`` partitions and return the seconds of each pass."""
    events: list[Event] = []
    model, x = chain(pairs), torch.zeros(4, WIDTH)
    dnifx.decouple(model, cuts + 1, args=(x,), gradient="zero", verify=verify, callback=events.append)
    return {event.name: event.seconds for event in events}


def best(pairs: int, rounds: int) -> dict[str, float]:
    """Return the fastest time of each pass over several rounds, in seconds."""
    found = [seconds_by_pass(pairs) for _ in range(rounds)]
    return {name: min(seconds[name] for seconds in found) for name in found[0]}


def figures(rounds: int) -> dict[str, dict[str, float]]:
    """Return microseconds a node at both lengths and their ratio, by pass and for all passes."""
    small, large = SIZES
    seconds_by_pass(small // 10, cuts=5)
    seconds = {pairs: best(pairs, rounds) for pairs in SIZES}
    for each in seconds.values():
        each["all"] = sum(each.values())
    found: dict[str, dict[str, float]] = {}
    for name in seconds[small]:
        each_node = {pairs: seconds[pairs][name] / (2 * pairs) * 1e6 for pairs in SIZES}
        ratio = each_node[large] / each_node[small]
        found[name] = {str(small): each_node[small], str(large): each_node[large], "ratio": ratio}
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the figures as a table."""
    small, large = SIZES
    shown = Table(title="Microseconds a node", title_justify="left")
    for name in ("pass", f"{small} pairs", f"{large} pairs", "ratio"):
        shown.add_column(name, justify="left" if name == "pass" else "right")
    for name, row in found.items():
        shown.add_row(name, f"{row[str(small)]:.1f}", f"{row[str(large)]:.1f}", f"{row['ratio']:.2f}")
    return shown


def main() -> None:
    """Measure, print, and write the figures to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=3, help="compilations of each length; the fastest counts (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    found = figures(options.rounds)
    console = Console()
    console.print(table(found))
    console.print(", ".join(f"{name} {value}" for name, value in machine(device).items()))
    if options.json is not None:
        options.json.write_text(as_json("pipeline", device, found))


if __name__ == "__main__":
    main()
