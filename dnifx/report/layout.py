"""The second half of the picture's layout: bands below each other, gates between them, long lines in a gutter.

A gate shows a boundary with its estimator, or values that cross without a gradient. The gutter is at the right, where
lines run past whole bands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from dnifx.report.grid import LANE, Grid, Point, Rect, grid_of, lanes, text_width
from dnifx.report.picture import Net, Picture

MARGIN = 20.0
PAD = 14.0
TITLE = 84.0
WIDEST_KEY = 660.0
"""Width of the line that explains the colours."""

SIDE = 5.0
"""Distance between a line and the gradient that goes back beside it."""

LINE = 16.0
"""Height of a line of text."""


@dataclass(frozen=True)
class Route:
    """A line: its points, its look, and whether it ends in an arrow.

    The looks are ``flow``, ``plain``, ``cut`` and ``locked``, for values, and ``synthetic`` and ``target``, for gradients.
    """

    points: tuple[Point, ...]
    kind: str
    arrow: bool = True


@dataclass(frozen=True)
class Drawing:
    """The picture with the place of everything."""

    width: float
    height: float
    bands: Mapping[int, Rect]
    boxes: Mapping[str, Rect]
    gates: Mapping[str, Rect]
    routes: tuple[Route, ...]


@dataclass(frozen=True)
class Gap:
    """The space below a band: upper lanes, gates, lower lanes; y counts from the band's lower edge."""

    upper: Mapping[str, int]
    lower: Mapping[str, int]
    gates: float

    @property
    def gate_y(self) -> float:
        """Upper edge of the gates."""
        return PAD + _lanes_height(self.upper)

    @property
    def lower_lanes(self) -> float:
        """Upper edge of the lower lanes."""
        return self.gate_y + self.gates + (PAD if self.gates else 0.0)

    @property
    def height(self) -> float:
        """Distance to the next band."""
        return self.lower_lanes + _lanes_height(self.lower) + PAD / 2

    def upper_y(self, key: str) -> float:
        """A net's lane above the gates."""
        return PAD + self.upper[key] * LANE

    def lower_y(self, key: str) -> float:
        """A net's lane below the gates."""
        return self.lower_lanes + self.lower[key] * LANE


def _lanes_height(used: Mapping[str, int]) -> float:
    """Height of the lanes in use, and the distance to what follows."""
    return max(used.values()) * LANE + PAD if used else 0.0


def place(picture: Picture) -> Drawing:
    """Lay a picture out from top to bottom. Time and space are nearly linear in what it shows."""
    nets = nets_of(picture)
    band_of = {box.key: box.band for box in picture.boxes}
    indices = [band.index for band in picture.bands]
    titles = max(text_width(text) for band in picture.bands for text in (band.title, *band.detail.split(" · "))) + 24
    left = MARGIN + titles
    grids = {
        index: grid_of(
            picture,
            index,
            [(net.key, box) for net in nets for box in net.targets if band_of[box] == index],
            [(net.key, box) for net in nets for box in net.sources if band_of[box] == index],
        )
        for index in indices
    }
    gate_x = {index: _gate_places(nets, index, grids[index], left) for index in indices}
    ends = [rect.right for row in gate_x.values() for rect in row.values()]
    ends += [left + grid.width for grid in grids.values()]
    right = max([*ends, MARGIN + text_width(picture.detail), MARGIN + WIDEST_KEY]) + PAD
    gutter = lanes(_long_spans(nets, band_of))
    return _assemble(_Frame(picture, nets, grids, gate_x, band_of, left, right, gutter))


def nets_of(picture: Picture) -> list[Net]:
    """Collect what runs from band to band: through gates, and inputs and outputs of the model without one."""
    band_of = {box.key: box.band for box in picture.boxes}
    free: dict[tuple[str, bool], list[str]] = {}
    for line in picture.lines:
        if band_of[line.source] != band_of[line.target]:
            free.setdefault((line.source, line.dashed), []).append(line.target)
    return list(picture.gates) + [
        Net(f"line {source}", band_of[source], (), (source,), tuple(targets), dashed)
        for (source, dashed), targets in free.items()
    ]


def _gate_places(nets: Sequence[Net], band: int, grid: Grid, left: float) -> dict[str, Rect]:
    """Put the gates below a band side by side, each as near as possible to the boxes that it comes from."""
    wanted = []
    for net in nets:
        if net.lines and net.band == band:
            middles = [left + grid.exits[net.key, box][-1][0] for box in net.sources]
            wanted.append((sum(middles) / len(middles), net.key, net.lines))
    placed: dict[str, Rect] = {}
    free = left
    for middle, key, lines in sorted(wanted):
        width, height = max(map(text_width, lines)) + 24, len(lines) * LINE + 12
        x = max(free, middle - width / 2)
        placed[key] = Rect(x, 0.0, width, height)
        free = x + width + PAD
    return placed


def _long_spans(nets: Sequence[Net], band_of: Mapping[str, int]) -> list[tuple[str, float, float]]:
    """List the nets that run past a whole band, with the bands that they pass."""
    ends = ((net, max(band_of[box] for box in net.targets)) for net in nets)
    return [(net.key, net.band * 100.0, (last - 1) * 100.0) for net, last in ends if last > net.band + 1]


@dataclass(frozen=True)
class _Frame:
    """What is known before the heights: every x, and the lanes in the gutter."""

    picture: Picture
    nets: Sequence[Net]
    grids: Mapping[int, Grid]
    gate_x: Mapping[int, Mapping[str, Rect]]
    band_of: Mapping[str, int]
    left: float
    right: float
    gutter: Mapping[str, int]

    def gutter_x(self, net: Net) -> float:
        """The x of a net in the gutter."""
        return self.right + PAD + self.gutter[net.key] * LANE

    def start_x(self, net: Net) -> float:
        """The x where a net's lower lane begins: under its gate, or under its only source."""
        if net.lines:
            return self._free_x(net, self.gate_x[net.band][net.key])
        return self.left + self.grids[net.band].exits[net.key, net.sources[0]][-1][0]

    def _free_x(self, net: Net, rect: Rect) -> float:
        """The x where a net leaves its gate: the middle, or beside it where another net enters the next band."""
        taken = [
            self.entry_x(other, box)
            for other in self.nets
            if other is not net
            for box in other.targets
            if self.band_of[box] == net.band + 1
        ]
        middle = rect.centre[0]
        steps = range(int(rect.width / 2 / LANE) - 1)
        places = [middle + side * step * LANE for step in steps for side in (1, -1)]
        return next((x for x in places if all(abs(x - other) >= LANE / 2 for other in taken)), middle)

    def entry_x(self, net: Net, box: str) -> float:
        """The x where a net enters the band of a box."""
        return self.left + self.grids[self.band_of[box]].entries[net.key, box][0][0]

    def by_upper_lane(self, net: Net) -> bool:
        """Whether a net without a gate leaves by a lane above the gates, so that it does not cross one."""
        return not net.lines and bool(self.gate_x[net.band]) and net.key in self.gutter


def _gap(frame: _Frame, band: int) -> Gap:
    """Assign the lanes below one band."""
    upper, lower = [], []
    for net in frame.nets:
        near = [frame.entry_x(net, box) for box in net.targets if frame.band_of[box] == band + 1]
        if net.band == band:
            upper += _upper_spans(frame, net)
        if net.band == band and not frame.by_upper_lane(net):
            across = [frame.start_x(net), *near, *([frame.gutter_x(net)] if net.key in frame.gutter else [])]
            lower += [(net.key, min(across), max(across))]
        elif near:
            lower += [(net.key, min(near), frame.gutter_x(net))]
    height = max((rect.height for rect in frame.gate_x[band].values()), default=0.0)
    return Gap(lanes(upper), lanes(lower), height)


def _upper_spans(frame: _Frame, net: Net) -> list[tuple[str, float, float]]:
    """Return how far a net runs above the gates: from its sources to its gate, or to the gutter."""
    starts = [frame.left + frame.grids[net.band].exits[net.key, box][-1][0] for box in net.sources]
    if frame.by_upper_lane(net):
        return [(net.key, starts[0], frame.gutter_x(net))]
    if not net.lines:
        return []
    rect = frame.gate_x[net.band][net.key]
    ends = [_clamp(x, rect) for x in starts]
    return [(net.key, min(starts + ends), max(starts + ends))] if starts != ends else []


def _clamp(x: float, rect: Rect) -> float:
    """Return the x on a gate's upper or lower edge that is nearest to x."""
    return min(max(x, rect.x + 10), rect.right - 10)


def _assemble(frame: _Frame) -> Drawing:
    """Stack bands and gaps, and draw every line through them."""
    bands: dict[int, Rect] = {}
    gaps: dict[int, Gap] = {}
    y = TITLE
    width = frame.right - MARGIN
    for band in frame.picture.bands:
        text = (1 + len(band.detail.split(" · ")) * bool(band.detail)) * LINE
        height = max(frame.grids[band.index].height, text) + 2 * PAD
        bands[band.index] = Rect(MARGIN, y, width, height)
        gaps[band.index] = _gap(frame, band.index)
        y += height + gaps[band.index].height
    boxes = {
        key: rect.moved(frame.left, bands[index].y + PAD)
        for index, grid in frame.grids.items()
        for key, rect in grid.rects.items()
    }
    gates = {
        key: rect.moved(0.0, bands[index].bottom + gaps[index].gate_y)
        for index, row in frame.gate_x.items()
        for key, rect in row.items()
    }
    routes = [
        Route(_moved(points, frame.left, bands[index].y + PAD), "plain" if line.dashed else "flow")
        for index, grid in frame.grids.items()
        for line, points in grid.routes.items()
    ]
    stack = _Stack(frame, bands, gaps, gates)
    for net in frame.nets:
        routes += stack.routes(net)
    lanes_used = max(frame.gutter.values(), default=-1) + 1
    total = frame.right + (PAD + lanes_used * LANE if lanes_used else 0.0) + MARGIN
    bottom = max(rect.bottom for rect in bands.values())
    return Drawing(total, bottom + MARGIN, bands, boxes, gates, tuple(routes))


def _moved(points: Sequence[Point], x: float, y: float) -> tuple[Point, ...]:
    """Shift points."""
    return tuple((a + x, b + y) for a, b in points)


@dataclass(frozen=True)
class _Stack:
    """The frame with every y known: it draws the lines from band to band."""

    frame: _Frame
    bands: Mapping[int, Rect]
    gaps: Mapping[int, Gap]
    gates: Mapping[str, Rect]

    def routes(self, net: Net) -> list[Route]:
        """Draw one net: from its sources to its gate, if it has one, and on to each box that takes it."""
        band = self.bands[net.band]
        exits = self.frame.grids[net.band].exits
        starts = [_moved(exits[net.key, box], self.frame.left, band.y + PAD) for box in net.sources]
        if not net.lines:
            only = starts[0]
            ways = [_tidy((*only, *self.way(net, box, only[-1][0]))) for box in net.targets]
            return [Route(points, net.kind) for points in _branches(ways)]
        rect = self.gates[net.key]
        routes = []
        for points in starts:
            start, end = points[-1][0], _clamp(points[-1][0], rect)
            bend = [(x, band.bottom + self.gaps[net.band].upper_y(net.key)) for x in (start, end) if start != end]
            routes.append(Route(_tidy((*points, *bend, (end, rect.y))), net.kind, arrow=False))
        estimates = [_back(route.points, "synthetic") for route in routes] if net.estimates else []
        ways = [_tidy(self.way_from_gate(net, box, rect)) for box in net.targets]
        targets = [_back(points, "target") for points in ways] if net.fits or net.locked else []
        return [*estimates, *targets, *routes, *(Route(points, net.kind) for points in _branches(ways))]

    def way_from_gate(self, net: Net, box: str, rect: Rect) -> tuple[Point, ...]:
        """Lead a net from its gate to a box: straight down where that is possible."""
        x = self.frame.entry_x(net, box)
        if self.frame.band_of[box] == net.band + 1 and x == _clamp(x, rect):
            return (x, rect.bottom), *self.entry(net, box)
        x = self.frame.start_x(net)
        return (x, rect.bottom), *self.way(net, box, x)

    def way(self, net: Net, box: str, x: float) -> tuple[Point, ...]:
        """Lead a net from x, below its band or gate, to a box: by its lane, and by the gutter to later bands."""
        target = self.frame.band_of[box]
        gap, base = self.gaps[net.band], self.bands[net.band].bottom
        entry = self.entry(net, box)
        upper = self.frame.by_upper_lane(net)
        y = base + (gap.upper_y(net.key) if upper else gap.lower_y(net.key))
        if target == net.band + 1 and not upper:
            return (x, y), (entry[0][0], y), *entry
        side = self.frame.gutter_x(net)
        arrival = self.bands[target - 1].bottom + self.gaps[target - 1].lower_y(net.key)
        return (x, y), (side, y), (side, arrival), (entry[0][0], arrival), *entry

    def entry(self, net: Net, box: str) -> tuple[Point, ...]:
        """Lead a net from the upper edge of a box's band into the box."""
        band = self.frame.band_of[box]
        return _moved(self.frame.grids[band].entries[net.key, box], self.frame.left, self.bands[band].y + PAD)


def _back(points: Sequence[Point], kind: str) -> Route:
    """Return the line of a gradient, which goes back beside the line of the values."""
    moves = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points)]
    aside = [((dy > 0) - (dy < 0), (dx < 0) - (dx > 0)) for dx, dy in moves]
    around = zip([aside[0], *aside], [*aside, aside[-1]], strict=True)
    shifts = [one if one == two else (one[0] + two[0], one[1] + two[1]) for one, two in around]
    moved = [(x + SIDE * a, y + SIDE * b) for (x, y), (a, b) in zip(points, shifts, strict=True)]
    return Route(tuple(reversed(moved)), kind)


def _branches(ways: Sequence[tuple[Point, ...]]) -> list[tuple[Point, ...]]:
    """Let each way begin where it leaves the ways before it, so that nothing is drawn twice."""
    return [
        min((_without_shared(way, other) for other in ways[:place_]), key=_length, default=way)
        for place_, way in enumerate(ways)
    ]


def _without_shared(way: tuple[Point, ...], other: tuple[Point, ...]) -> tuple[Point, ...]:
    """Drop the beginning that a way shares with another."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(way, other, strict=False)))
    if same == 0 or same in (len(way), len(other)):
        return way
    start, ours, theirs = way[same - 1], way[same], other[same]
    if _direction(start, ours) != _direction(start, theirs):
        return way[same - 1 :]
    return way[same:] if _length((start, ours)) <= _length((start, theirs)) else (theirs, *way[same:])


def _direction(one: Point, two: Point) -> tuple[bool, bool, bool, bool]:
    """Return the direction of a vertical or horizontal piece."""
    return one[0] < two[0], one[0] > two[0], one[1] < two[1], one[1] > two[1]


def _length(points: Sequence[Point]) -> float:
    """Return the length of a way."""
    return sum(abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pairwise(points))


def _tidy(points: Sequence[Point]) -> tuple[Point, ...]:
    """Drop repeated points and points in the middle of a straight piece."""
    kept: list[Point] = []
    for point in points:
        if kept and kept[-1] == point:
            continue
        while len(kept) > 1 and _straight(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _straight(one: Point, two: Point, three: Point) -> bool:
    """Whether three points lie on one vertical or horizontal line."""
    return one[0] == two[0] == three[0] or one[1] == two[1] == three[1]
