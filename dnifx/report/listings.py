"""Emitted code as a page shows it: listings, and which of their lines an operation, a cut or an action became."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dnifx.ir import Kind, Part, Program
from dnifx.schedules import on_partition, timed

ASSIGNS = re.compile(r"\s+(\w+)(?:, \w+)*,? = ")
BEGINS = re.compile(r"    # ([A-Z]+(?:_[A-Z])?\d+)\S*: ")
"""How the lines of an action begin in a training step."""

Lines = tuple[int, int]
"""The first and the last line of a piece of a listing, counted from 1."""


@dataclass(frozen=True)
class Emitted:
    """The code of one part.

    Attributes:
        partitions: The function of each partition, by its number in the net.
        suffixes: The functions of thin suffixes, by the number of their boundary in the net.
        step: The training step, or why there is none.
    """

    partitions: Mapping[int, str]
    suffixes: Mapping[int, str] = field(default_factory=dict)
    step: str = ""


Pieces = tuple[int, tuple[Lines, ...]]
"""The number of a listing, and pieces of it."""


@dataclass
class Listings:
    """Code, and where in it things are.

    Attributes:
        texts: Title and text of each listing.
        bands: The listing of each partition.
        nodes: For a node its listing and its line.
        gates: For the key of a gate what asks, feeds and fits its estimator.
        actions: For the name of an action, such as ``F0``, what it runs.
    """

    texts: list[tuple[str, str]] = field(default_factory=list)
    bands: dict[int, int] = field(default_factory=dict)
    nodes: dict[str, tuple[int, int]] = field(default_factory=dict)
    gates: dict[str, list[Pieces]] = field(default_factory=dict)
    actions: dict[str, Pieces] = field(default_factory=dict)

    def add(self, title: str, text: str) -> int:
        """Add a listing, and return its number."""
        self.texts.append((title, text))
        return len(self.texts) - 1


def listings_of(program: Program, emitted: Sequence[Emitted]) -> Listings:
    """Find everything in the code of all parts, which are given in their order; without any, nothing is found."""
    found, before = Listings(), 0
    for code, (part, own) in zip(emitted, program.fired(), strict=False):
        for band, text in code.partitions.items():
            _add_partition(found, program, band, text)
        if code.step:
            _add_step(found, program, code.step, part, _gates(part, own, before))
        for number, text in code.suffixes.items():
            listing = found.add("its thin suffix", text)
            found.gates.setdefault(f"cut_{number}", []).append((listing, ((1, text.count("\n") + 1),)))
        before += len(own.recurrences)
    return found


def _add_partition(found: Listings, program: Program, band: int, text: str) -> None:
    """Add the function of a partition."""
    listing = found.add(f"forward of {program.partitions[band].name}" if program.partitions else "forward", text)
    found.bands[band] = listing
    found.nodes.update({name: (listing, line) for name, line in assigned(text).items()})


def _add_step(found: Listings, program: Program, text: str, part: Part, gates: Mapping[str, int]) -> None:
    """Add the training step of a part, whose partitions and gates have numbers of their own there."""
    listing = found.add("training step" + (f", every {part.every} windows" if part.every > 1 else ""), text)
    blocks = action_blocks(text)
    for local, band in enumerate(part.partitions):
        named = {f"{kind}{band}": blocks.get(f"{kind}{local}") for kind in Kind if on_partition(kind)}
        found.actions.update({name: (listing, (lines,)) for name, lines in named.items() if lines})
    for key, local in gates.items():
        names = [f"{kind}{local}" for kind in Kind if not on_partition(kind) and f"{kind}{local}" in blocks]
        if names:
            found.gates[key] = [(listing, tuple(blocks[name] for name in names))]
        if not program.parts:
            found.actions.update({name: (listing, (blocks[name],)) for name in names})


def _gates(part: Part, own: Program, before: int) -> dict[str, int]:
    """Return the number that a part's step gives to each gate; ``before`` is how many cuts in time other parts have."""
    inside, in_time = part.boundaries or tuple(range(len(own.boundaries))), timed(own)
    found = {f"cut_{number}": local for local, number in enumerate(inside)}
    for place, each in enumerate(own.recurrences):
        if each in in_time:
            found[f"time_{before + place}"] = len(inside) + in_time.index(each)
    return found


def assigned(text: str) -> dict[str, int]:
    """Return the line in which each name is first assigned."""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := ASSIGNS.match(line):
            found.setdefault(match[1], number)
    return found


def action_blocks(text: str) -> dict[str, Lines]:
    """Return the lines of each action of a training step; the last one ends before the step returns."""
    lines = text.splitlines()
    starts = [(match[1], number) for number, line in enumerate(lines, 1) if (match := BEGINS.match(line))]
    end = next((number for number, line in enumerate(lines, 1) if line.startswith("    return ")), len(lines) + 1)
    stops = [(name, start, stop - 1) for (name, start), (_, stop) in pairwise([*starts, ("", end)])]
    return {name: (start, stop) for name, start, stop in stops}


def pieces(lines: Iterable[int]) -> tuple[Lines, ...]:
    """Join lines that follow each other."""
    found: list[Lines] = []
    for line in sorted(set(lines)):
        if found and line == found[-1][1] + 1:
            found[-1] = (found[-1][0], line)
        else:
            found.append((line, line))
    return tuple(found)
