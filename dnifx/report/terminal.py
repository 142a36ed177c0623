"""A program as a person reads it in a terminal: partitions and their costs, boundaries and their estimators."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dnifx.errors import visible
from dnifx.ir import BAR as PERIOD_BAR
from dnifx.ir import Program
from dnifx.report.facts import BoundaryFacts, PartitionFacts, ProgramFacts, ValueFacts, common_path, program_facts
from dnifx.units import byte_size, percent, plural, quantity, share_bar

BAR = 8
"""Width of the bar that shows a partition's share of the cost, in characters."""

SHOWN = 6
"""How many values, kept modules or crossings are listed; the others are counted."""


def render(program: Program, width: int = 100) -> str:
    """Return the report as plain text without colour, ``width`` characters wide."""
    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(ProgramReport(program))
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


@dataclass(frozen=True)
class ProgramReport:
    """A program for rich: it shows what is known after the passes that ran."""

    program: Program

    def __rich__(self) -> RenderableType:
        facts = program_facts(self.program)
        parts: list[RenderableType] = [headline(facts)]
        if facts.partitions:
            parts += ["", partition_table(facts.partitions)]
        if facts.boundaries:
            parts += ["", boundary_table(facts.boundaries)]
        lines = sections(facts)
        return Group(*parts, *(["", *lines] if lines else []))


def headline(facts: ProgramFacts) -> RenderableType:
    """Describe the program in a few lines; a period is written out."""
    counts = (len(facts.partitions), "partition"), (len(facts.boundaries), "boundary")
    sizes = [plural(number, noun) for number, noun in counts if number]
    sizes += [plural(facts.nodes, "node"), plural(facts.parameters, "parameter")]
    sizes += [quantity(facts.flops, "FLOP")] if facts.flops else []
    checked = "verified against the original" if facts.capture and facts.capture.verified else "not verified"
    lines = {
        "inputs": _listed(facts.inputs),
        "capture": f"{facts.capture.method}, {checked}" if facts.capture else None,
        "context": facts.context,
        "schedule": facts.schedule_name,
        "period": facts.schedule if facts.schedule and PERIOD_BAR in facts.schedule else None,
    }
    labelled = [Text.assemble((f"{label:<10}", "dim"), shown(text)) for label, text in lines.items() if text]
    return Group(Text.assemble(shown(facts.model, "bold"), "  ", " · ".join(sizes)), *labelled)


def shown(text: str, style: str = "") -> Text:
    """Return a text as it is: no part of it is markup, and none acts on the terminal."""
    return Text(visible(text), style=style)


def partition_table(partitions: tuple[PartitionFacts, ...]) -> Table:
    """Lay out the partitions, one in each row, with their share of the cost as a bar."""
    table = _table()
    table.add_column("partition", style="bold cyan", no_wrap=True)
    table.add_column("from .. to", overflow="fold")
    rates = any(part.every > 1 for part in partitions)
    for name in (*(["every"] if rates else []), "nodes", "params", "FLOPs", "activations"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cost", no_wrap=True, min_width=BAR + 5)
    for part in partitions:
        table.add_row(
            part.name,
            shown(span(part, partitions)),
            *([plural(part.every, "window")] if rates else []),
            f"{part.nodes:,}",
            quantity(part.parameters),
            quantity(part.flops),
            byte_size(part.activation_bytes),
            Text.assemble(f"{percent(part.share):>4} ", (share_bar(part.share, BAR), "cyan")),
        )
    return table


def boundary_table(boundaries: tuple[BoundaryFacts, ...]) -> Table:
    """Lay out the boundaries, one in each row: the values, where they cross, and the estimator."""
    table = _table()
    table.add_column("boundary", style="bold magenta", overflow="fold")
    table.add_column("values", overflow="fold")
    table.add_column("from -> to", overflow="fold")
    table.add_column("estimator", overflow="fold")
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, width=6 if any(line.locked for line in boundaries) else 0)
    for line in boundaries:
        table.add_row(
            shown(line.name),
            shown(_listed(line.values, "\n")),
            f"{line.producer.removeprefix('submod_')} -> {_numbers(line.consumers)}",
            shown(estimator_text(line)),
            "" if line.estimator_parameters is None else quantity(line.estimator_parameters),
            Text("locked", "bold red") if line.locked else "",
        )
    return table


def span(part: PartitionFacts, partitions: tuple[PartitionFacts, ...]) -> str:
    """Say where in the model a partition begins and ends; a partition that is a whole module is named by it."""
    if not part.first:
        return "inputs only"
    whole = common_path((part.first, part.last))
    elsewhere = [path for other in partitions if other is not part for path in other.modules]
    inside = all(_within(path, whole) for path in part.modules)
    if whole and inside and not any(_within(path, whole) for path in elsewhere):
        return whole
    return f"{part.first} .. {part.last}"


def _within(path: str, module: str) -> bool:
    """Whether a path belongs to a module or to a part of it."""
    return f"{path}.".startswith(f"{module}.")


def estimator_text(line: BoundaryFacts) -> str:
    """Describe the estimator and the synthetic input model of a boundary."""
    text = line.estimator or "none yet"
    if line.messages > 1:
        text += f"\n{line.messages} messages at once" + (f", scale {line.scale:g}" if line.scale != 1 else "")
    if line.input_model is None:
        return text
    return f"{text}\ninput model {line.input_model}, {plural(line.input_model_parameters or 0, 'parameter')}"


def sections(facts: ProgramFacts) -> list[RenderableType]:
    """List the values without an interface, what capture kept whole or failed with, and the notes of the passes."""
    crossing = [
        f"{item.value}, {item.producer.removeprefix('submod_')} -> {_numbers(item.consumers)}"
        for item in facts.without_gradient
    ]
    kept, tried = (facts.capture.kept, facts.capture.tried) if facts.capture else ((), ())
    return [
        *_section("values that cross without a gradient, and so without an interface", crossing),
        *_section("modules that capture kept whole", [f"{path}: {reason}" for path, reason in kept]),
        *_section("capture methods that failed before", [f"{method}: {reason}" for method, reason in tried]),
        *_section("notes", list(facts.notes), limit=len(facts.notes)),
    ]


def _section(title: str, lines: list[str], limit: int = SHOWN) -> list[RenderableType]:
    """Put a title over an indented list; an empty list has none."""
    indented = (Padding(shown(line), (0, 0, 0, 2)) for line in _first(lines, limit))
    return [Text(title, "bold"), *indented] if lines else []


def _table() -> Table:
    """Make a table with a line below its head and no others."""
    return Table(
        box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="dim"
    )


def _numbers(names: tuple[str, ...]) -> str:
    """Write partitions by their numbers."""
    return ", ".join(name.removeprefix("submod_") for name in names)


def _listed(values: Iterable[ValueFacts], separator: str = ", ") -> str:
    """Join the first values, and count the others."""
    return separator.join(_first(list(map(str, values)), SHOWN))


def _first(items: list[str], limit: int) -> list[str]:
    """Keep the first items, and count the others."""
    return items if len(items) <= limit + 1 else [*items[:limit], f"… and {len(items) - limit} more"]
