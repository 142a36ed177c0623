"""Boxes of one band in columns and rows, and the lines between them: the first half of the picture's layout."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from dnifx.report.picture import INPUTS, Box, Line, Picture

Point = tuple[float, float]

LANE = 9.0
"""Distance between lines that run side by side, in pixels, as all lengths here."""

ROW, ROW_GAP = 42.0, 14.0
CHANNEL = 26.0
CHARACTER = 7.4
"""Width of a character of the 12 px monospaced font, with a little to spare."""


@dataclass(frozen=True)
class Rect:
    """A rectangle, from its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """The right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.y + self.height

    @property
    def centre(self) -> Point:
        """The middle."""
        return self.x + self.width / 2, self.y + self.height / 2

    def moved(self, x: float, y: float) -> "Rect":
        """Return it shifted."""
        return Rect(self.x + x, self.y + y, self.width, self.height)


@dataclass(frozen=True)
class Grid:
    """The boxes of one band, measured from the band's upper left corner.

    Attributes:
        rects: Place of each box.
        routes: Points of each line inside the band.
        entries: For (net, box): where a line from above crosses the band's upper edge, and its points from there on.
        exits: For (net, box): points of a line from the box to the band's lower edge.
        width: Width of all columns.
        height: Height of lanes and rows.
    """

    rects: Mapping[str, Rect]
    routes: Mapping[Line, tuple[Point, ...]]
    entries: Mapping[tuple[str, str], tuple[Point, ...]]
    exits: Mapping[tuple[str, str], tuple[Point, ...]]
    width: float
    height: float


def text_width(text: str) -> float:
    """Return the width of a line of text."""
    return len(text) * CHARACTER


def lanes(spans: Iterable[tuple[str, float, float]]) -> dict[str, int]:
    """Give each span, by key, the first lane in which it overlaps no earlier one."""
    taken: list[list[tuple[float, float]]] = []
    found: dict[str, int] = {}
    for key, start, end in spans:
        low, high = min(start, end) - LANE, max(start, end) + LANE
        free = (place for place, used in enumerate(taken) if all(high < begin or low > stop for begin, stop in used))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        found[key] = lane
    return found


def columns_of(picture: Picture, band: int) -> list[list[Box]]:
    """Sort a band's boxes into columns by the lines between them; inputs stand side by side."""
    boxes = {box.key: box for box in picture.boxes if box.band == band}
    if band == INPUTS:
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
        middle = {key: _mean([rows[source] for source in graph.predecessors(key)], order[key]) for key in generation}
        column = sorted(generation, key=lambda key: (middle[key], order[key]))
        rows.update({key: float(row) for row, key in enumerate(column)})
        columns.append([boxes[key] for key in column])
    return columns


def _mean(values: Sequence[float], default: float) -> float:
    """Return the mean, or the default of nothing."""
    return sum(values) / len(values) if values else default


@dataclass(frozen=True)
class _Plan:
    """Which column and row each box has, and who runs through the channel left of each column."""

    places: Mapping[str, tuple[int, int]]
    depth: Sequence[int]
    channels: Sequence[Sequence[tuple[str, ...]]]
    over: Mapping[str, int]


def grid_of(
    picture: Picture, band: int, entering: Sequence[tuple[str, str]], leaving: Sequence[tuple[str, str]]
) -> Grid:
    """Place a band's boxes and route what runs between them, comes from above and leaves below.

    Args:
        picture: The picture.
        band: Index of the band.
        entering: (net, box) for each line from above.
        leaving: (net, box) for each line that leaves below.
    """
    columns = columns_of(picture, band)
    own = {box.key for column in columns for box in column}
    inner = [line for line in picture.lines if line.source in own and line.target in own]
    plan = _plan(columns, inner, entering, leaving)
    rects, lane_x, width = _rects(columns, plan)
    height = max((rect.bottom for rect in rects.values()), default=ROW)
    return Grid(
        rects,
        {line: _inner_route(line, plan, rects, lane_x) for line in inner},
        {pair: _entry(pair, entering, plan, rects, lane_x) for pair in entering},
        {pair: _exit(pair, leaving, plan, rects, lane_x, height) for pair in leaving},
        width,
        height,
    )


def _plan(
    columns: Sequence[Sequence[Box]],
    inner: Sequence[Line],
    entering: Sequence[tuple[str, str]],
    leaving: Sequence[tuple[str, str]],
) -> _Plan:
    """Decide which lines run through which channel, and which over the boxes."""
    places = {box.key: (place, row) for place, column in enumerate(columns) for row, box in enumerate(column)}
    channels: list[list[tuple[str, ...]]] = [[] for _ in range(len(columns) + 1)]
    over = []
    for line in inner:
        (start, row), (end, other) = places[line.source], places[line.target]
        if end > start + 1:
            channels[start + 1].append(("out", line.source, line.target))
            over.append((f"{line.source} {line.target}", float(start) * 100, float(end) * 100))
        if end > start + 1 or row != other:
            channels[end].append(("in", line.source, line.target))
    for net, box in entering:
        if places[box][1] > 0:
            channels[places[box][0]].append(("entry", net, box))
    for net, box in leaving:
        if places[box][1] < len(columns[places[box][0]]) - 1:
            channels[places[box][0] + 1].append(("exit", net, box))
    return _Plan(places, [len(column) for column in columns], channels, lanes(over))


def _rects(
    columns: Sequence[Sequence[Box]], plan: _Plan
) -> tuple[dict[str, Rect], dict[tuple[str, ...], float], float]:
    """Place boxes column by column, and each channel's lanes left of its column."""
    top = (max(plan.over.values()) + 1) * LANE if plan.over else 0.0
    x = 0.0
    rects: dict[str, Rect] = {}
    lane_x: dict[tuple[str, ...], float] = {}
    for place, channel in enumerate(plan.channels):
        edge = place in (0, len(columns))
        room = len(channel) * LANE + (0.0 if edge and not channel else 4.0 if edge else CHANNEL)
        begin = x + (4.0 if edge else CHANNEL / 3)
        lane_x.update({user: begin + lane * LANE for lane, user in enumerate(channel)})
        x += room
        if place == len(columns):
            break
        width = max(box_width(box) for box in columns[place])
        for row, box in enumerate(columns[place]):
            rects[box.key] = Rect(x, top + row * (ROW + ROW_GAP), width, ROW)
        x += width
    return rects, lane_x, x


def box_width(box: Box) -> float:
    """Return the width that a box's text needs."""
    return max(64.0, max(text_width(box.title), text_width(box.detail)) + 16)


def _inner_route(
    line: Line, plan: _Plan, rects: Mapping[str, Rect], lane_x: Mapping[tuple[str, ...], float]
) -> tuple[Point, ...]:
    """Lead a line from box to box: straight, by a channel, or over the boxes between them."""
    source, target = rects[line.source], rects[line.target]
    begin, end = (source.right, source.centre[1]), (target.x, target.centre[1])
    arrive = lane_x.get(("in", line.source, line.target))
    leave = lane_x.get(("out", line.source, line.target))
    if arrive is None:
        return begin, end
    if leave is None:
        return begin, (arrive, begin[1]), (arrive, end[1]), end
    y = plan.over[f"{line.source} {line.target}"] * LANE
    return begin, (leave, begin[1]), (leave, y), (arrive, y), (arrive, end[1]), end


def _entry(
    pair: tuple[str, str],
    entering: Sequence[tuple[str, str]],
    plan: _Plan,
    rects: Mapping[str, Rect],
    lane_x: Mapping[tuple[str, ...], float],
) -> tuple[Point, ...]:
    """Lead a line from the band's upper edge into a box: from above, or by the channel where another box is above."""
    rect = rects[pair[1]]
    lane = lane_x.get(("entry", *pair))
    if lane is not None:
        return (lane, 0.0), (lane, rect.centre[1]), (rect.x, rect.centre[1])
    x = _port(pair, entering, rect)
    return (x, 0.0), (x, rect.y)


def _exit(
    pair: tuple[str, str],
    leaving: Sequence[tuple[str, str]],
    plan: _Plan,
    rects: Mapping[str, Rect],
    lane_x: Mapping[tuple[str, ...], float],
    height: float,
) -> tuple[Point, ...]:
    """Lead a line from a box to the band's lower edge: straight down, or by the channel where another box is below."""
    rect = rects[pair[1]]
    lane = lane_x.get(("exit", *pair))
    if lane is not None:
        return (rect.right, rect.centre[1]), (lane, rect.centre[1]), (lane, height)
    x = _port(pair, leaving, rect)
    return (x, rect.bottom), (x, height)


def _port(pair: tuple[str, str], pairs: Sequence[tuple[str, str]], rect: Rect) -> float:
    """Spread the lines that meet one side of a box over its width."""
    nets = [net for net, box in pairs if box == pair[1]]
    return rect.x + rect.width * (nets.index(pair[0]) + 1) / (len(nets) + 1)
