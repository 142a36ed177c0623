"""A program as Graphviz text: partitions are clusters, modules are nodes, and cuts with their estimators are between them."""

from collections.abc import Iterator

from dnifx.errors import visible
from dnifx.ir import Program
from dnifx.report.picture import INPUTS, Box, Net, Picture, picture_of

HEAD = (
    "rankdir=TB",
    "compound=true",
    'fontname="Helvetica"',
    "labelloc=t",
    "labeljust=l",
    'node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica", fontsize=11]',
    'edge [fontname="Helvetica", fontsize=10]',
)

KEY = "orange: values across a cut, blue: synthetic gradient, green: its target, dashed: no gradient"
"""What the colours mean."""

PLAIN = 'style=dashed, color="#5b6470"'
"""The style of values without a gradient."""


def to_dot(program: Program) -> str:
    """Return the program as a Graphviz digraph, ready for ``dot -Tsvg``."""
    picture = picture_of(program)
    lines = [f"digraph {quote(picture.title)} {{", *(f"  {line};" for line in HEAD)]
    lines.append(f"  label={quote(picture.title, picture.detail, KEY)};")
    lines += (f"  {line}" for line in _body(picture))
    return "\n".join([*lines, "}", ""])


def quote(*lines: str) -> str:
    """Return the lines as one quoted DOT string; backslashes and quotes in them are escaped."""
    escaped = (
        visible(line, kept="\n").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        for line in lines
        if line
    )
    return '"' + "\\n".join(escaped) + '"'


def _body(picture: Picture) -> Iterator[str]:
    """Write clusters, gates and lines."""
    last = picture.bands[-1].index
    for band in picture.bands:
        boxes = [box for box in picture.boxes if box.band == band.index]
        if band.index in (INPUTS, last):
            yield from (_box(box, 'shape=ellipse, fillcolor="#eceff3"') for box in boxes)
            continue
        yield f"subgraph cluster_{band.index} {{"
        yield f'  label={quote(band.title, band.detail)}; style="rounded,filled"; color="#4a6fa5"; fillcolor="#eef3fa";'
        yield from (f"  {_box(box)}" for box in boxes)
        yield "}"
    for line in picture.lines:
        yield f"{quote(line.source)} -> {quote(line.target)}{f' [{PLAIN}]' if line.dashed else ''};"
    for gate in picture.gates:
        yield from _gate(gate)


def _box(box: Box, style: str = "") -> str:
    """Write one box."""
    return f"{quote(box.key)} [label={quote(box.title, box.detail)}{', ' if style else ''}{style}, tooltip={quote(box.about)}];"


def _gate(gate: Net) -> Iterator[str]:
    """Write a gate and the lines through it: into the estimator, and on to each consumer."""
    if gate.dashed:
        look, edge = f'{PLAIN}, fontcolor="#3b424c"', PLAIN
    else:
        color = "#a3171f" if gate.locked else "#b34700"
        look = f'shape=octagon, style=filled, fillcolor="#fff1e0", color="{color}", penwidth=2'
        edge = f'color="{color}", penwidth=1.6'
    label = quote(*gate.lines, "locked" if gate.locked else "")
    yield f"{quote(gate.key)} [label={label}, {look}, tooltip={quote(gate.about)}];"
    yield from (f"{quote(source)} -> {quote(gate.key)} [{edge}, dir=none];" for source in gate.sources)
    yield from (f"{quote(gate.key)} -> {quote(target)} [{edge}];" for target in gate.targets)
    back = 'constraint=false, penwidth=1.6, color="'
    if gate.estimates:
        yield from (f'{quote(gate.key)} -> {quote(source)} [{back}#1d5fd0"];' for source in gate.sources)
    if gate.fits or gate.locked:
        yield from (f'{quote(target)} -> {quote(gate.key)} [{back}#177a2f"];' for target in gate.targets)
