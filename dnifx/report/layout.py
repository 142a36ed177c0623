"""The last third of the picture's layout: strips below each other, gates between bands, long lines in a gutter.

A gate shows a boundary with its estimator, or values that cross without a gradient. The gutter is at the right, where
lines run past whole strips.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dnifx.report.grid import LANE, Grid, Point, Rect, grid_of, lanes
from dnifx.report.picture import Net, Picture
from dnifx.report.strips import Strip, strips_of, text_width
from dnifx.report.ways import Route, back, branches, moved, tidy

MARGIN = 20.0
PAD = 14.0
TITLE = 84.0
WIDEST_KEY = 660.0
"""Width of the line that explains the colours."""

LINE = 16.0
"""Height of a line of text."""


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
    """The space below a strip: upper lanes, gates, lower lanes; y counts from the strip's lower edge."""

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
        """Distance to the next strip."""
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
    strips = strips_of(picture)
    strip_of = {box.key: at for at, strip in enumerate(strips) for column in strip.columns for box in column}
    nets = nets_of(picture, strip_of)
    lowest = {strip.band: at for at, strip in enumerate(strips)}
    leaves = {net.key: lowest[net.band] if net.lines else strip_of[net.sources[0]] for net in nets}
    titles = max(text_width(text) for band in picture.bands for text in (band.title, *band.detail.split(" · "))) + 24
    left = MARGIN + titles
    grids = [
        grid_of(
            strip.columns,
            picture.lines,
            [(net.key, box) for net in nets for box in net.targets if strip_of[box] == at],
            [(net.key, box) for net in nets for box in net.sources if strip_of[box] == at],
        )
        for at, strip in enumerate(strips)
    ]
    exit_x = {pair: left + points[-1][0] for grid in grids for pair, points in grid.exits.items()}
    gate_x = [
        _gate_places([net for net in nets if net.lines and leaves[net.key] == at], exit_x, left)
        for at in range(len(strips))
    ]
    ends = [rect.right for row in gate_x for rect in row.values()]
    ends += [left + grid.width for grid in grids]
    right = max([*ends, MARGIN + text_width(picture.detail), MARGIN + WIDEST_KEY]) + PAD
    gutter = lanes(_long_spans(nets, strip_of, leaves))
    return _assemble(_Frame(picture, strips, nets, grids, exit_x, gate_x, strip_of, leaves, left, right, gutter))


def nets_of(picture: Picture, strip_of: Mapping[str, int]) -> list[Net]:
    """Collect what runs from strip to strip: through gates, and lines without one."""
    band_of = {box.key: box.band for box in picture.boxes}
    free: dict[tuple[str, bool], list[str]] = {}
    for line in picture.lines:
        if strip_of[line.source] != strip_of[line.target]:
            free.setdefault((line.source, line.dashed), []).append(line.target)
    return list(picture.gates) + [
        Net(f"line {source}", band_of[source], (), (source,), tuple(targets), dashed)
        for (source, dashed), targets in free.items()
    ]


def _gate_places(gates: Sequence[Net], exit_x: Mapping[tuple[str, str], float], left: float) -> dict[str, Rect]:
    """Put the gates below a band side by side, each as near as possible to the boxes that it comes from."""
    wanted = []
    for gate in gates:
        middles = [exit_x[gate.key, box] for box in gate.sources]
        wanted.append((sum(middles) / len(middles), gate.key, gate.lines))
    placed: dict[str, Rect] = {}
    free = left
    for middle, key, lines in sorted(wanted):
        width, height = max(map(text_width, lines)) + 24, len(lines) * LINE + 12
        x = max(free, middle - width / 2)
        placed[key] = Rect(x, 0.0, width, height)
        free = x + width + PAD
    return placed


def _long_spans(
    nets: Sequence[Net], strip_of: Mapping[str, int], leaves: Mapping[str, int]
) -> list[tuple[str, float, float]]:
    """List the nets that run past a whole strip, or from one to a gate further down, with the strips that they pass."""
    spans = []
    for net in nets:
        first = min(strip_of[box] for box in net.sources)
        last = max(strip_of[box] for box in net.targets) - 1
        if first < leaves[net.key] or last > leaves[net.key]:
            spans.append((net.key, first * 100.0, max(last, leaves[net.key]) * 100.0))
    return spans


@dataclass(frozen=True)
class _Frame:
    """What is known before the heights: every x, and the lanes in the gutter.

    ``strip_of`` is the strip of each box; ``leaves`` the one below which each net goes on, with its gate if it has one.
    """

    picture: Picture
    strips: Sequence[Strip]
    nets: Sequence[Net]
    grids: Sequence[Grid]
    exit_x: Mapping[tuple[str, str], float]
    gate_x: Sequence[Mapping[str, Rect]]
    strip_of: Mapping[str, int]
    leaves: Mapping[str, int]
    left: float
    right: float
    gutter: Mapping[str, int]

    def gutter_x(self, net: Net) -> float:
        """The x of a net in the gutter."""
        return self.right + PAD + self.gutter[net.key] * LANE

    def start_x(self, net: Net) -> float:
        """The x where a net's lower lane begins: under its gate, or under its only source."""
        if net.lines:
            return self._free_x(net, self.gate_x[self.leaves[net.key]][net.key])
        return self.exit_x[net.key, net.sources[0]]

    def arrival_x(self, net: Net, box: str) -> float:
        """The x where the line of one of its boxes arrives above a net's gate."""
        early = self.strip_of[box] < self.leaves[net.key]
        return self.gutter_x(net) if early else self.exit_x[net.key, box]

    def _free_x(self, net: Net, rect: Rect) -> float:
        """The x where a net leaves its gate: the middle, or beside it where another net enters the next strip."""
        taken = [
            self.entry_x(other, box)
            for other in self.nets
            if other is not net
            for box in other.targets
            if self.strip_of[box] == self.leaves[net.key] + 1
        ]
        middle = rect.centre[0]
        steps = range(int(rect.width / 2 / LANE) - 1)
        places = [middle + side * step * LANE for step in steps for side in (1, -1)]
        return next((x for x in places if all(abs(x - other) >= LANE / 2 for other in taken)), middle)

    def entry_x(self, net: Net, box: str) -> float:
        """The x where a net enters the strip of a box."""
        return self.left + self.grids[self.strip_of[box]].entries[net.key, box][0][0]

    def by_upper_lane(self, net: Net) -> bool:
        """Whether a net without a gate leaves by a lane above the gates, so that it does not cross one."""
        return not net.lines and bool(self.gate_x[self.leaves[net.key]]) and net.key in self.gutter


def _gap(frame: _Frame, at: int) -> Gap:
    """Assign the lanes below one strip."""
    upper, lower = [], []
    for net in frame.nets:
        leaves = frame.leaves[net.key]
        near = [frame.entry_x(net, box) for box in net.targets if frame.strip_of[box] == at + 1]
        if leaves == at:
            upper += _upper_spans(frame, net)
            far = [frame.gutter_x(net)] if any(frame.strip_of[box] > at + 1 for box in net.targets) else []
            across = [] if frame.by_upper_lane(net) else [frame.start_x(net), *near, *far]
        elif leaves > at:
            early = [frame.exit_x[net.key, box] for box in net.sources if frame.strip_of[box] == at]
            across = [*early, frame.gutter_x(net)] if early else []
        else:
            across = [*near, frame.gutter_x(net)] if near else []
        if across:
            lower.append((net.key, min(across), max(across)))
    height = max((rect.height for rect in frame.gate_x[at].values()), default=0.0)
    return Gap(lanes(upper), lanes(lower), height)


def _upper_spans(frame: _Frame, net: Net) -> list[tuple[str, float, float]]:
    """Return how far a net runs above the gates: from its sources to its gate, or to the gutter."""
    if frame.by_upper_lane(net):
        return [(net.key, frame.start_x(net), frame.gutter_x(net))]
    if not net.lines:
        return []
    starts = [frame.arrival_x(net, box) for box in net.sources]
    rect = frame.gate_x[frame.leaves[net.key]][net.key]
    ends = [_clamp(x, rect) for x in starts]
    return [(net.key, min(starts + ends), max(starts + ends))] if starts != ends else []


def _clamp(x: float, rect: Rect) -> float:
    """Return the x on a gate's upper or lower edge that is nearest to x."""
    return min(max(x, rect.x + 10), rect.right - 10)


def _assemble(frame: _Frame) -> Drawing:
    """Stack strips and gaps, and draw every line through them."""
    bands: dict[int, Rect] = {}
    stack = _Stack(frame, [], [], [_gap(frame, at) for at in range(len(frame.strips))], {})
    y = TITLE
    for band in frame.picture.bands:
        text = (1 + len(band.detail.split(" · ")) * bool(band.detail)) * LINE
        own = [at for at, strip in enumerate(frame.strips) if strip.band == band.index]
        bottom = y + PAD
        for at in own:
            stack.tops.append(bottom)
            stack.bottoms.append(bottom + frame.grids[at].height)
            bottom = stack.bottoms[at] + stack.gaps[at].height
        stack.bottoms[-1] = max(stack.bottoms[-1], y + PAD + text) + PAD
        bands[band.index] = Rect(MARGIN, y, frame.right - MARGIN, stack.bottoms[-1] - y)
        y = stack.bottoms[-1] + stack.gaps[own[-1]].height
    boxes = {
        key: rect.moved(frame.left, stack.tops[at])
        for at, grid in enumerate(frame.grids)
        for key, rect in grid.rects.items()
    }
    for at, row in enumerate(frame.gate_x):
        stack.gates.update(
            {key: rect.moved(0.0, stack.bottoms[at] + stack.gaps[at].gate_y) for key, rect in row.items()}
        )
    routes = [
        Route(moved(points, frame.left, stack.tops[at]), "plain" if line.dashed else "flow")
        for at, grid in enumerate(frame.grids)
        for line, points in grid.routes.items()
    ]
    for net in frame.nets:
        routes += stack.routes(net)
    lanes_used = max(frame.gutter.values(), default=-1) + 1
    total = frame.right + (PAD + lanes_used * LANE if lanes_used else 0.0) + MARGIN
    bottom = max(rect.bottom for rect in bands.values())
    return Drawing(total, bottom + MARGIN, bands, boxes, stack.gates, tuple(routes))


@dataclass(frozen=True)
class _Stack:
    """The frame with every y known: it draws the lines from strip to strip.

    ``tops`` and ``bottoms`` are the edges of the strips, ``gaps`` what is below each.
    """

    frame: _Frame
    tops: list[float]
    bottoms: list[float]
    gaps: Sequence[Gap]
    gates: dict[str, Rect]

    def routes(self, net: Net) -> list[Route]:
        """Draw one net: from its sources to its gate, if it has one, and on to each box that takes it."""
        starts = [self.exit(net, box) for box in net.sources]
        if not net.lines:
            only = starts[0]
            ways = [tidy((*only, *self.way(net, box, only[-1][0]))) for box in net.targets]
            return [Route(points, net.kind) for points in branches(ways)]
        rect = self.gates[net.key]
        leads = [
            tidy((*points, *self.to_gate(net, box, rect))) for points, box in zip(starts, net.sources, strict=True)
        ]
        routes = [Route(points, net.kind, arrow=False) for points in leads]
        estimates = [back(route.points, "synthetic") for route in routes] if net.estimates else []
        ways = [tidy(self.way_from_gate(net, box, rect)) for box in net.targets]
        targets = [back(points, "target") for points in ways] if net.fits or net.locked else []
        return [*estimates, *targets, *routes, *(Route(points, net.kind) for points in branches(ways))]

    def exit(self, net: Net, box: str) -> tuple[Point, ...]:
        """Lead a net from one of its boxes to the lower edge of the strip."""
        at = self.frame.strip_of[box]
        return moved(self.frame.grids[at].exits[net.key, box], self.frame.left, self.tops[at])

    def to_gate(self, net: Net, box: str, rect: Rect) -> tuple[Point, ...]:
        """Lead a net from below the strip of a box into its gate, by the gutter from an earlier strip."""
        at, leaves, x = self.frame.strip_of[box], self.frame.leaves[net.key], self.frame.arrival_x(net, box)
        end, points = _clamp(x, rect), []
        if at < leaves:
            y = self.bottoms[at] + self.gaps[at].lower_y(net.key)
            points = [(self.frame.exit_x[net.key, box], y), (x, y)]
        if x != end:
            y = self.bottoms[leaves] + self.gaps[leaves].upper_y(net.key)
            points += [(x, y), (end, y)]
        return *points, (end, rect.y)

    def way_from_gate(self, net: Net, box: str, rect: Rect) -> tuple[Point, ...]:
        """Lead a net from its gate to a box: straight down where that is possible."""
        x = self.frame.entry_x(net, box)
        if self.frame.strip_of[box] == self.frame.leaves[net.key] + 1 and x == _clamp(x, rect):
            return (x, rect.bottom), *self.entry(net, box)
        x = self.frame.start_x(net)
        return (x, rect.bottom), *self.way(net, box, x)

    def way(self, net: Net, box: str, x: float) -> tuple[Point, ...]:
        """Lead a net from x, below its strip or gate, to a box: by its lane, and by the gutter to later strips."""
        target, leaves = self.frame.strip_of[box], self.frame.leaves[net.key]
        gap, base = self.gaps[leaves], self.bottoms[leaves]
        entry = self.entry(net, box)
        upper = self.frame.by_upper_lane(net)
        y = base + (gap.upper_y(net.key) if upper else gap.lower_y(net.key))
        if target == leaves + 1 and not upper:
            return (x, y), (entry[0][0], y), *entry
        side = self.frame.gutter_x(net)
        arrival = self.bottoms[target - 1] + self.gaps[target - 1].lower_y(net.key)
        return (x, y), (side, y), (side, arrival), (entry[0][0], arrival), *entry

    def entry(self, net: Net, box: str) -> tuple[Point, ...]:
        """Lead a net from the upper edge of a box's strip into the box."""
        at = self.frame.strip_of[box]
        return moved(self.frame.grids[at].entries[net.key, box], self.frame.left, self.tops[at])
