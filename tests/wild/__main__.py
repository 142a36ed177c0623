"""Tries many random programs: ``python -m tests.wild --count 20000 --seed 0 --start 0``.

Exits with 1 if any was silently wrong, and prints the source of those.
"""

import re
import sys
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dnifx.errors import DnifxError
from tests.wild.checks import examine
from tests.wild.drawing import wild
from tests.wild.programs import Wild
from tests.wild.shrink import shrink
from tests.wild.wide import wide

SHOWN = 5
"""How many wrong programs are printed whole."""
LONGEST = 110
"""How much of an error's text tells its reason."""


@dataclass
class Tally:
    """What became of the programs.

    Attributes:
        passed: How many pass every check.
        boundaries: How many boundaries those have.
        partly: How many of those refuse a call of another kind.
        later: Why those do, by reason.
        refused: How many are refused as a whole, by reason.
        examples: The first program of each refusal, with the text.
        wrong: Those that are silently wrong or end in an error that is not dnifx's own.
    """

    passed: int = 0
    boundaries: int = 0
    partly: int = 0
    later: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[Wild, str]] = field(default_factory=dict)
    wrong: list[tuple[Wild, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many were tried."""
        return self.passed + self.refused.total() + len(self.wrong)

    def add(self, program: Wild, verify: bool = True) -> None:
        """Try one program."""
        try:
            boundaries, refusals = examine(program, verify)
        except DnifxError as error:
            self.refused[reason(error)] += 1
            self.examples.setdefault(reason(error), (program, str(error)))
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is what the command is there to tell
            self.wrong.append((program, f"{type(error).__name__}: {error}"))
        else:
            self.passed += 1
            self.boundaries += boundaries
            self.partly += bool(refusals)
            for text, refusal in {reason(each): each for each in refusals}.items():
                self.later[text] += 1
                self.examples.setdefault(text, (program, str(refusal)))

    def table(self) -> Table:
        """Return the counts."""
        table = Table("outcome", "programs", title=f"random programs: {self.boundaries} boundaries in those that pass")
        table.add_row("passed", self.share(self.passed))
        table.add_row("  of these, another call than the example's refused", self.share(self.partly))
        for text, number in self.later.most_common():
            table.add_row(f"    {text}", str(number))
        table.add_row("refused", self.share(self.refused.total()))
        for text, number in self.refused.most_common():
            table.add_row(f"    {text}", str(number))
        table.add_row("wrong", str(len(self.wrong)))
        return table

    def share(self, number: int) -> str:
        """Return a number of programs with its share of all."""
        return f"{number} ({number / max(self.total, 1):.1%})"


def reason(error: DnifxError) -> str:
    """Return an error's kind and the beginning of its first line, without the names and numbers of its program."""
    line = re.sub(r"'[^']*'", "'…'", str(error).splitlines()[0])
    line = re.sub(r"[\w.]*\d[\w.]*(, [\w.]*\d[\w.]*)*", "…", line)
    return f"{type(error).__name__}: {line}"[:LONGEST]


def is_wrong(program: Wild) -> bool:
    """Whether a program is silently wrong, or ends in an error that is not dnifx's own."""
    tally = Tally()
    tally.add(program)
    return bool(tally.wrong)


def main(
    count: Annotated[int, typer.Option(help="how many programs")] = 20000,
    seed: Annotated[int, typer.Option(help="another seed, other programs")] = 0,
    start: Annotated[int, typer.Option(help="number of the first, to go on where a run was stopped")] = 0,
    verify: Annotated[bool, typer.Option(help="let capture verify itself")] = True,
    examples: Annotated[bool, typer.Option(help="print one program for each kind of refusal")] = False,
    more: Annotated[bool, typer.Option("--wide", help="the programs of wide.py, and every kind of cuts")] = False,
    smaller: Annotated[
        bool, typer.Option("--shrink", help="drop steps of wrong programs while they stay wrong")
    ] = False,
) -> None:
    """Try random programs and print what became of them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console(soft_wrap=True)
    tally = Tally()
    with suppress(KeyboardInterrupt):
        for number in track(range(start, start + count), console=Console(stderr=True)):
            tally.add((wide if more else wild)(number, seed), verify)
    if tally.total < count:
        console.print(f"stopped; the rest: --start {start + tally.total} --count {count - tally.total}")
    console.print(tally.table())
    shown = [*tally.wrong[:SHOWN], *(tally.examples.values() if examples else ())]
    for program, text in shown:
        wrong = smaller and (program, text) in tally.wrong
        console.print(f"{text}\n{shrink(program, is_wrong) if wrong else program!r}", markup=False, highlight=False)
    if tally.wrong:
        console.print("wrong:", *(program.number for program, _ in tally.wrong), markup=False)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
