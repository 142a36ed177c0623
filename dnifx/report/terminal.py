"""A program as a person reads it in a terminal: partitions, boundaries, what stands on them, what it costs."""

from dataclasses import dataclass
from io import StringIO
from itertools import takewhile

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dnifx.ir import Program
from dnifx.report.facts import BoundaryFacts, PartitionFacts, ProgramFacts, ValueFacts, program_facts
from dnifx.report.units import byte_size, percent, plural, quantity, share_bar

BAR = 8
"""Width of the bar that shows a partition's share of the cost, in characters."""

SHOWN = 6
"""How many values, kept modules or crossings are written out before the rest is only counted."""


def render(program: Program, width: int = 100) -> str:
    """Return the report as plain text without colour, ``width`` characters wide."""
    return plain_text(ProgramReport(program), width)


def plain_text(report: RenderableType, width: int) -> str:
    """Return a report as plain text without colour, ``width`` characters wide."""
    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(report)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


@dataclass(frozen=True)
class ProgramReport:
    """A program for rich: shows whatever the passes that ran have found out."""

    program: Program

    def __rich__(self) -> RenderableType:
        return shown(program_facts(self.program))


def shown(facts: ProgramFacts) -> Group:
    """Lay out the facts of a program."""
    parts: list[RenderableType] = [headline(facts)]
    if facts.partitions:
        parts += ["", partition_table(facts.partitions)]
    if facts.boundaries:
        parts += ["", boundary_table(facts.boundaries)]
    lines = [*crossing_lines(facts), *kept_lines(facts), *note_lines(facts)]
    return Group(*parts, *(["", *lines] if lines else []))


def headline(facts: ProgramFacts) -> RenderableType:
    """Say in two or three lines what the program is."""
    sizes = [plural(facts.nodes, "node"), plural(facts.parameters, "parameter")]
    if facts.flops:
        sizes.append(quantity(facts.flops, "FLOP"))
    if facts.partitions:
        sizes[:0] = [plural(len(facts.partitions), "partition")]
    if facts.boundaries:
        sizes[1:1] = [plural(len(facts.boundaries), "boundary")]
    lines = [Text.assemble((facts.model, "bold"), "  ", " · ".join(sizes))]
    if facts.inputs:
        lines.append(_labelled("inputs", _listed([f"{value.name} {value.text}" for value in facts.inputs])))
    if facts.capture:
        checked = "verified against the original" if facts.capture.verified else "not verified"
        lines.append(_labelled("capture", f"{facts.capture.method}, {checked}"))
    lines += [_labelled(name, text) for name, text in _run_lines(facts)]
    return Group(*lines)


def partition_table(partitions: tuple[PartitionFacts, ...]) -> Table:
    """Lay the partitions out, one a row, with their share of the cost as a bar."""
    table = _table()
    table.add_column("partition", style="bold cyan", no_wrap=True)
    table.add_column("from .. to", overflow="fold")
    for name in ("nodes", "params", "FLOPs", "activations"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cost", no_wrap=True, min_width=BAR + 5)
    for part in partitions:
        table.add_row(
            part.name,
            span(part, partitions),
            f"{part.nodes:,}",
            quantity(part.parameters),
            quantity(part.flops),
            byte_size(part.activation_bytes),
            Text.assemble(f"{percent(part.share):>4} ", (share_bar(part.share, BAR), "cyan")),
        )
    return table


def boundary_table(boundaries: tuple[BoundaryFacts, ...]) -> Table:
    """Lay the boundaries out, one a row: what crosses, from where to where, and what answers for its gradient."""
    table = _table()
    table.add_column("boundary", style="bold magenta", overflow="fold")
    table.add_column("values", overflow="fold")
    table.add_column("from -> to", overflow="fold")
    table.add_column("estimator", overflow="fold")
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, width=6 if any(line.locked for line in boundaries) else 0)
    for line in boundaries:
        table.add_row(
            line.name,
            _listed([_value(value) for value in line.values], "\n"),
            f"{line.producer.removeprefix('submod_')} -> {_numbers(line.consumers)}",
            estimator_text(line),
            "" if line.estimator_parameters is None else quantity(line.estimator_parameters),
            Text("locked", "bold red") if line.locked else "",
        )
    return table


def span(part: PartitionFacts, partitions: tuple[PartitionFacts, ...]) -> str:
    """Say where in the model a partition begins and ends; a module that it is the whole of stands alone."""
    if not part.first:
        return "inputs only"
    shared = zip(part.first.split("."), part.last.split("."), strict=False)
    whole = ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], shared))
    elsewhere = [path for other in partitions if other is not part for path in other.modules]
    inside = all(_within(path, whole) for path in part.modules)
    if whole and inside and not any(_within(path, whole) for path in elsewhere):
        return whole
    return f"{part.first} .. {part.last}"


def _within(path: str, module: str) -> bool:
    """Whether a path is a module's or that of a part of it."""
    return f"{path}.".startswith(f"{module}.")


def estimator_text(line: BoundaryFacts) -> str:
    """Say what stands on a boundary, the synthetic input model included."""
    text = line.estimator or "none yet"
    if line.input_model is None:
        return text
    return f"{text}\ninput model {line.input_model}, {plural(line.input_model_parameters or 0, 'parameter')}"


def crossing_lines(facts: ProgramFacts) -> list[RenderableType]:
    """List the values that cross without a gradient."""
    lines = [
        f"{_value(item.value)}, {item.producer.removeprefix('submod_')} -> {_numbers(item.consumers)}"
        for item in facts.without_gradient
    ]
    return _section("crosses without a gradient, and so without an interface", lines)


def kept_lines(facts: ProgramFacts) -> list[RenderableType]:
    """List what capture kept whole and which techniques it gave up, with the reasons."""
    if facts.capture is None:
        return []
    kept = _section("kept whole by capture", [f"{path}: {reason}" for path, reason in facts.capture.kept])
    return kept + _section("tried before", [f"{method}: {reason}" for method, reason in facts.capture.tried])


def note_lines(facts: ProgramFacts) -> list[RenderableType]:
    """List what the passes fixed or left out."""
    return _section("notes", list(facts.notes), limit=None)


def _run_lines(facts: ProgramFacts) -> list[tuple[str, str]]:
    """Say what estimators see and what a step runs, where known."""
    lines = [("context", facts.context), ("schedule", facts.schedule_name)]
    return [(name, text) for name, text in lines if text]


def _section(title: str, lines: list[str], limit: int | None = SHOWN) -> list[RenderableType]:
    """Head an indented list with its title; an empty list has none."""
    if not lines:
        return []
    first = lines if limit is None else _first(lines, limit)
    return [Text(title, "bold"), *(Padding(Text(line), (0, 0, 0, 2)) for line in first)]


def _table() -> Table:
    """Make a table with a rule under its head and no other lines."""
    return Table(
        box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="dim"
    )


def _labelled(label: str, text: str) -> Text:
    """Put a dim label of fixed width before a text."""
    return Text.assemble((f"{label:<10}", "dim"), text)


def _value(value: ValueFacts) -> str:
    """Name a value with its shape."""
    return f"{value.name} {value.text}"


def _numbers(names: tuple[str, ...]) -> str:
    """Write partitions by their numbers."""
    return ", ".join(name.removeprefix("submod_") for name in names)


def _listed(items: list[str], separator: str = ", ") -> str:
    """Join items, counting those beyond the first few."""
    return separator.join(_first(items, SHOWN))


def _first(items: list[str], limit: int) -> list[str]:
    """Keep the first items and count the rest."""
    return items if len(items) <= limit + 1 else [*items[:limit], f"… and {len(items) - limit} more"]
