"""The second third of the picture's layout: the boxes of one strip in columns and rows, and the lines between them.

A net is what one value joins across strips. All lengths are in pixels. Channels are the gaps between columns; lines run
down them side by side, each in a lane of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dnifx.report.picture import Line
from dnifx.report.strips import CHANNEL, Columns, box_width

Point = tuple[float, float]

LANE = 16.0
"""Distance between lines that run side by side."""

ROW, ROW_GAP = 42.0, 14.0


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
        """Return the rectangle, shifted."""
        return Rect(self.x + x, self.y + y, self.width, self.height)


@dataclass(frozen=True)
class Grid:
    """The boxes of one strip, measured from the strip's upper left corner.

    Attributes:
        rects: Place of each box, by key.
        routes: Points of each line inside the strip.
        entries: For (net, box): points of a line from the strip's upper edge to the box.
        exits: For (net, box): points of a line from the box to the strip's lower edge.
        width: Width of all columns.
        height: Height of lanes and rows.
    """

    rects: Mapping[str, Rect]
    routes: Mapping[Line, tuple[Point, ...]]
    entries: Mapping[tuple[str, str], tuple[Point, ...]]
    exits: Mapping[tuple[str, str], tuple[Point, ...]]
    width: float
    height: float


def lanes(spans: Iterable[tuple[str, float, float]]) -> dict[str, int]:
    """Give each span (key, start, end) the first lane in which it overlaps no earlier one."""
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


def grid_of(
    columns: Columns, lines: Sequence[Line], entering: Sequence[tuple[str, str]], leaving: Sequence[tuple[str, str]]
) -> Grid:
    """Place the boxes of a strip, and route lines between them, from above (``entering``) and to below (``leaving``).

    The two hold (net, box) for each such line. Of ``lines``, those between other boxes are left out.
    """
    own = {box.key for column in columns for box in column}
    inner = [line for line in lines if line.source in own and line.target in own]
    channels, over = _channels(columns, inner, entering, leaving)
    rects, lane_x, width = _rects(columns, channels, (max(over.values()) + 1) * LANE if over else 0.0)
    ways = _Ways(rects, lane_x, over)
    height = max((rect.bottom for rect in rects.values()), default=ROW)
    return Grid(
        rects,
        {line: ways.inside(line) for line in inner},
        {pair: ways.entry(pair, entering) for pair in entering},
        {pair: ways.exit(pair, leaving, height) for pair in leaving},
        width,
        height,
    )


def _channels(
    columns: Columns,
    inner: Sequence[Line],
    entering: Sequence[tuple[str, str]],
    leaving: Sequence[tuple[str, str]],
) -> tuple[list[list[tuple[str, ...]]], dict[str, int]]:
    """Return which lines run down the channel left of each column, and the lanes of those that run over the boxes."""
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
    return channels, lanes(over)


def _rects(
    columns: Columns, channels: Sequence[Sequence[tuple[str, ...]]], top: float
) -> tuple[dict[str, Rect], dict[tuple[str, ...], float], float]:
    """Return the place of each box, the x of each lane in a channel, and the width of everything."""
    x = 0.0
    rects: dict[str, Rect] = {}
    lane_x: dict[tuple[str, ...], float] = {}
    for place, channel in enumerate(channels):
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


@dataclass(frozen=True)
class _Ways:
    """Routes lines between placed boxes: ``lane_x`` are lanes in channels, ``over`` are lanes over the boxes."""

    rects: Mapping[str, Rect]
    lane_x: Mapping[tuple[str, ...], float]
    over: Mapping[str, int]

    def inside(self, line: Line) -> tuple[Point, ...]:
        """Lead a line from box to box: straight, through a channel, or over the boxes between them."""
        source, target = self.rects[line.source], self.rects[line.target]
        begin, end = (source.right, source.centre[1]), (target.x, target.centre[1])
        arrive = self.lane_x.get(("in", line.source, line.target))
        leave = self.lane_x.get(("out", line.source, line.target))
        if arrive is None:
            return begin, end
        if leave is None:
            return begin, (arrive, begin[1]), (arrive, end[1]), end
        y = self.over[f"{line.source} {line.target}"] * LANE
        return begin, (leave, begin[1]), (leave, y), (arrive, y), (arrive, end[1]), end

    def entry(self, pair: tuple[str, str], entering: Sequence[tuple[str, str]]) -> tuple[Point, ...]:
        """Lead a line from the strip's upper edge into a box: from above, or through the channel past the boxes above."""
        rect, lane = self.rects[pair[1]], self.lane_x.get(("entry", *pair))
        if lane is not None:
            return (lane, 0.0), (lane, rect.centre[1]), (rect.x, rect.centre[1])
        x = _port(pair, entering, rect)
        return (x, 0.0), (x, rect.y)

    def exit(self, pair: tuple[str, str], leaving: Sequence[tuple[str, str]], height: float) -> tuple[Point, ...]:
        """Lead a line from a box to the strip's lower edge: straight down, or through the channel past the boxes below."""
        rect, lane = self.rects[pair[1]], self.lane_x.get(("exit", *pair))
        if lane is not None:
            return (rect.right, rect.centre[1]), (lane, rect.centre[1]), (lane, height)
        x = _port(pair, leaving, rect)
        return (x, rect.bottom), (x, height)


def _port(pair: tuple[str, str], pairs: Sequence[tuple[str, str]], rect: Rect) -> float:
    """Spread the lines that meet one side of a box over its width."""
    nets = [net for net, box in pairs if box == pair[1]]
    return rect.x + rect.width * (nets.index(pair[0]) + 1) / (len(nets) + 1)
