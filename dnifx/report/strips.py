"""The first third of the picture's layout: which boxes stand side by side, and where a band goes on below.

A band is one partition, or the model's inputs or output. Its boxes stand in columns, by the lines between them. Where its
columns are wider than the page, they go on in another strip below, as the lines of a text do.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from dnifx.report.picture import INPUTS, Box, Picture

Columns = Sequence[Sequence[Box]]
"""Boxes in columns from left to right, those of a column from top to bottom."""

WIDEST = 900.0
"""Width in pixels beyond which the columns of a band go on below."""

CHANNEL = 26.0
"""Least distance between columns."""

CHARACTER = 7.4
"""Width of a character of the 12 px monospaced font, and a little more."""


@dataclass(frozen=True)
class Strip:
    """Columns of one band that stand side by side; ``band`` is its index."""

    band: int
    columns: Columns


def strips_of(picture: Picture) -> list[Strip]:
    """Return the strips of all bands from top to bottom, one or more for each band."""
    return [Strip(band.index, each) for band in picture.bands for each in wrapped(columns_of(picture, band.index))]


def columns_of(picture: Picture, band: int) -> list[list[Box]]:
    """Sort a band's boxes into columns by the lines between them; inputs and outputs stand side by side."""
    boxes = {box.key: box for box in picture.boxes if box.band == band}
    if band in (INPUTS, picture.bands[-1].index):
        return [[box] for box in boxes.values()]
    order = {key: place for place, key in enumerate(boxes)}
    graph = nx.DiGraph()
    graph.add_nodes_from(boxes)
    graph.add_edges_from(
        (line.source, line.target) for line in picture.lines if line.source in boxes and line.target in boxes
    )
    rows: dict[str, float] = {}
    columns = []
    for generation in nx.topological_generations(graph):
        sources = {key: [rows[source] for source in graph.predecessors(key)] or [order[key]] for key in generation}
        middle = {key: sum(found) / len(found) for key, found in sources.items()}
        column = sorted(generation, key=lambda key: (middle[key], order[key]))
        rows.update({key: float(row) for row, key in enumerate(column)})
        columns.append([boxes[key] for key in column])
    return columns


def wrapped(columns: Columns) -> list[Columns]:
    """Break columns into strips that are no wider than ``WIDEST``, as few as possible, and about equally wide."""

    def filled(limit: float) -> list[Columns]:
        return list(_filled(columns, limit))

    least = len(filled(WIDEST))
    return filled(bisect_left(range(int(WIDEST)), -least, key=lambda limit: -len(filled(limit))))


def _filled(columns: Columns, limit: float) -> Iterator[Columns]:
    """Fill strips one after another."""
    strip: list[Sequence[Box]] = []
    width = 0.0
    for column in columns:
        more = column_width(column) + CHANNEL
        if strip and width + more > limit:
            yield strip
            strip, width = [], 0.0
        strip.append(column)
        width += more
    yield strip


def column_width(column: Sequence[Box]) -> float:
    """Return the width of the widest box of a column."""
    return max(map(box_width, column))


def box_width(box: Box) -> float:
    """Return the width that a box's text needs."""
    return max(64.0, max(text_width(box.title), text_width(box.detail)) + 16)


def text_width(text: str) -> float:
    """Return the width of a line of text."""
    return len(text) * CHARACTER
