"""A program as an SVG, which any browser shows."""

from collections.abc import Iterator, Sequence
from html import escape

from dnifx.errors import visible
from dnifx.ir import Program
from dnifx.report.grid import Point, Rect
from dnifx.report.layout import LINE, MARGIN, Drawing, Route, place
from dnifx.report.picture import INPUTS, Box, Net, Picture, picture_of

TINTS = (("#e8f0fb", "#2f5d9b"), ("#e7f5ec", "#256b43"), ("#f4ecfa", "#6a3d93"), ("#fdf3dc", "#7d5a00"))
"""Fill and line of the partitions, in turn."""

STROKES = {"flow": "#2b3138", "plain": "#5b6470", "cut": "#b34700", "locked": "#a3171f"}
STYLE = (
    "text{font-family:ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,'Liberation Mono',monospace;font-size:12px;"
    "fill:#15191e}.small{fill:#3b424c}.title{font-size:18px;font-weight:bold}.name{font-weight:bold}"
)
CORNER = 5.0


def to_svg(program: Program) -> str:
    """Return the program as one SVG document: partitions top to bottom, cuts with their estimators between them."""
    picture = picture_of(program)
    drawing = place(picture)
    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}"'
    view = f'viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img">',
            f"<title>{shown(picture.title)}: {shown(picture.detail)}</title>",
            f"<style>{STYLE}</style>",
            *_markers(),
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            _text(picture.title, MARGIN, 28, "title"),
            _text(picture.detail, MARGIN, 48, "small"),
            *_bands(picture, drawing),
            *(_route(route) for route in drawing.routes),
            *(line for box in picture.boxes for line in _box(box, drawing.boxes[box.key], picture)),
            *(line for gate in picture.gates for line in _gate(gate, drawing.gates[gate.key])),
            "</svg>",
            "",
        ]
    )


def shown(text: str) -> str:
    """Return a text as the content of an element: no markup, and no character that XML forbids."""
    return escape(visible(text))


def _markers() -> Iterator[str]:
    """Define an arrow head for each kind of line."""
    yield "<defs>"
    for kind, color in STROKES.items():
        yield (
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0 0.5L8 4L0 7.5z" fill="{color}"/></marker>'
        )
    yield "</defs>"


def _bands(picture: Picture, drawing: Drawing) -> Iterator[str]:
    """Draw each partition as a tinted band with its title at the left."""
    for band in picture.bands:
        rect = drawing.bands[band.index]
        fill, line = _tint(band.index, picture)
        yield f"<g>{_rect(rect, fill, line, 8)}"
        yield _text(band.title, rect.x + 12, rect.y + 14 + LINE * 0.8, "name")
        for place_, text in enumerate(band.detail.split(" · ") if band.detail else []):
            yield _text(text, rect.x + 12, rect.y + 14 + LINE * (place_ + 1.8), "small")
        yield "</g>"


def _tint(band: int, picture: Picture) -> tuple[str, str]:
    """Choose the colours of a band; inputs and output are grey."""
    return ("#f1f3f5", "#c3c9d0") if band in (INPUTS, picture.bands[-1].index) else TINTS[band % len(TINTS)]


def _box(box: Box, rect: Rect, picture: Picture) -> Iterator[str]:
    """Draw one box with its two lines of text; the tooltip lists the graph's nodes."""
    yield f"<g><title>{shown(', '.join(box.nodes))}</title>{_rect(rect, '#ffffff', _tint(box.band, picture)[1], 5)}"
    yield from _lines([text for text in (box.title, box.detail) if text], rect)
    yield "</g>"


def _gate(gate: Net, rect: Rect) -> Iterator[str]:
    """Draw a gate: filled where gradients are decoupled, dashed where there are none."""
    if gate.dashed:
        yield "<g>" + _rect(rect, "#ffffff", STROKES[gate.kind], 3, 'stroke-dasharray="5 3"')
    else:
        yield "<g>" + _rect(rect, "#fff1e0", STROKES[gate.kind], 12, 'stroke-width="2"')
    yield from _lines(gate.lines, rect)
    yield "</g>"


def _lines(texts: Sequence[str], rect: Rect) -> Iterator[str]:
    """Write lines of text in the middle of a rectangle, the first in bold."""
    middle, y = rect.centre
    for place_, text in enumerate(texts):
        base = y + (place_ - (len(texts) - 1) / 2) * LINE + 4
        yield _text(text, middle, base, "small" if place_ else "name", ' text-anchor="middle"')


def _text(text: str, x: float, y: float, look: str, more: str = "") -> str:
    """Write one line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{look}"{more}>{shown(text)}</text>'


def _rect(rect: Rect, fill: str, stroke: str, radius: float, more: str = "") -> str:
    """Draw one rectangle."""
    place_ = f'x="{rect.x:.1f}" y="{rect.y:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}"'
    return f'<rect {place_} rx="{radius}" fill="{fill}" stroke="{stroke}" {more}/>'


def _route(route: Route) -> str:
    """Draw one line with rounded corners."""
    dash = ' stroke-dasharray="5 4"' if route.kind == "plain" else ""
    width = "1.8" if route.kind in ("cut", "locked") else "1.3"
    arrow = f' marker-end="url(#{route.kind})"' if route.arrow else ""
    look = f'fill="none" stroke="{STROKES[route.kind]}" stroke-width="{width}"{dash}{arrow}'
    return f'<path d="{_path(route.points)}" {look}/>'


def _path(points: Sequence[Point]) -> str:
    """Write points as a path whose corners are rounded."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        start, end = _towards(corner, before), _towards(corner, after)
        parts.append(f"L{start[0]:.1f} {start[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {end[0]:.1f} {end[1]:.1f}")
    return "".join([*parts, f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"])


def _towards(corner: Point, other: Point) -> Point:
    """Return the point towards another one at which the rounding of a corner begins."""
    length = abs(other[0] - corner[0]) + abs(other[1] - corner[1])
    part = min(CORNER, length / 2) / length if length else 0.0
    return corner[0] + (other[0] - corner[0]) * part, corner[1] + (other[1] - corner[1]) * part
