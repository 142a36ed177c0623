"""A program as an SVG, which any browser shows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from urllib.parse import quote

from dnifx.errors import visible
from dnifx.ir import Program
from dnifx.report.grid import Point, Rect
from dnifx.report.layout import LINE, MARGIN, Drawing, place
from dnifx.report.picture import INPUTS, Box, Net, Picture, picture_of
from dnifx.report.strips import text_width
from dnifx.report.ways import Route

LINES = {
    "flow": "values",
    "cut": "values across a cut",
    "locked": "values across a locked cut",
    "plain": "no gradient",
    "synthetic": "synthetic gradient",
    "target": "target gradient",
}
"""What each look of a line means."""

LIGHT = {
    "page": "#ffffff",
    "text": "#15191e",
    "small": "#3b424c",
    "box": "#ffffff",
    "gate": "#fff1e0",
    "end": "#f1f3f5 #c3c9d0",
    "tint0": "#e8f0fb #2f5d9b",
    "tint1": "#e7f5ec #256b43",
    "tint2": "#f4ecfa #6a3d93",
    "tint3": "#fdf3dc #7d5a00",
    "flow": "#2b3138",
    "plain": "#5b6470",
    "cut": "#b34700",
    "locked": "#a3171f",
    "synthetic": "#1d5fd0",
    "target": "#177a2f",
}
DARK = {
    "page": "#14181d",
    "text": "#e8ebef",
    "small": "#b4bcc6",
    "box": "#1d232a",
    "gate": "#3a2814",
    "end": "#1b2026 #4a525c",
    "tint0": "#16243a #6f9bd8",
    "tint1": "#132a1c #63b384",
    "tint2": "#281b35 #b58ad9",
    "tint3": "#30270f #d0a93f",
    "flow": "#c3cad3",
    "plain": "#8b949f",
    "cut": "#f0913e",
    "locked": "#f0696f",
    "synthetic": "#6fa8ff",
    "target": "#5cc27a",
}
"""The colours by what they are for: of text, areas and lines; a band has one for its area and one for its frame."""

TINTS = 4
"""How many colours the partitions take in turn."""

FONT = "ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,'Liberation Mono',monospace"
CORNER = 5.0


def to_svg(program: Program, links: Mapping[str, str] | None = None) -> str:
    """Return the program as one SVG document: partitions top to bottom, cuts with their estimators between them.

    Args:
        program: The program, after any pass.
        links: Addresses by the names of nodes, such as ``model.py#L12``. A box leads to that of its first node.
    """
    picture = picture_of(program)
    drawing = place(picture)
    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}"'
    view = f'viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} class="dnifx" role="img">',
            f"<title>{shown(picture.title)}: {shown(picture.detail)}</title>",
            f"<style>{_style()}</style>",
            *_markers(),
            '<rect width="100%" height="100%" class="page"/>',
            _text(picture.title, MARGIN, 28, "title"),
            _text(picture.detail, MARGIN, 48, "small"),
            *_key(drawing),
            *_bands(picture, drawing),
            *(_route(route) for route in drawing.routes),
            *(line for box in picture.boxes for line in _box(box, drawing.boxes[box.key], picture, links or {})),
            *(line for gate in picture.gates for line in _gate(gate, drawing.gates[gate.key])),
            "</svg>",
            "",
        ]
    )


def links_to(text: str, address: str) -> dict[str, str]:
    """Return the address of each node's line in emitted code: ``model.py#L12``."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if assigned := re.match(r"\s+(\w+) = ", line):
            found.setdefault(assigned[1], f"{quote(address)}#L{number}")
    return found


def _style() -> str:
    """Write the style sheet, for light and dark pages; its rules hold inside this picture alone."""
    fixed = (
        f".dnifx text{{font-family:{FONT};font-size:12px}}.dnifx .title{{font-size:18px;font-weight:bold}}"
        ".dnifx .name{font-weight:bold}.dnifx path.line{fill:none}.dnifx a:hover rect{stroke-width:2.5}"
    )
    return fixed + _colours(LIGHT) + "@media (prefers-color-scheme:dark){" + _colours(DARK) + "}"


def _colours(colours: Mapping[str, str]) -> str:
    """Write the rules for one set of colours."""
    rules = [f".dnifx text{{fill:{colours['text']}}}.dnifx text.small{{fill:{colours['small']}}}"]
    rules += [f".dnifx .{name}{{fill:{colours[name]}}}" for name in ("page", "box", "gate")]
    for name in ("end", *(f"tint{tint}" for tint in range(TINTS))):
        area, frame = colours[name].split()
        rules.append(f".dnifx .{name}{{fill:{area};stroke:{frame}}}.dnifx .box.of-{name}{{stroke:{frame}}}")
    for name in LINES:
        rules.append(
            f".dnifx .line.{name},.dnifx .gate.{name}{{stroke:{colours[name]}}}"
            f".dnifx .head.{name}{{fill:{colours[name]}}}"
        )
    return "".join(rules)


def shown(text: str) -> str:
    """Return a text as the content of an element: no markup, and no character that XML forbids."""
    return escape(visible(text))


def _markers() -> Iterator[str]:
    """Define an arrow head for each kind of line."""
    yield "<defs>"
    for kind in LINES:
        yield (
            f'<marker id="dnifx-{kind}" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto" markerUnits="userSpaceOnUse"><path d="M0 0.5L8 4L0 7.5z" class="head {kind}"/></marker>'
        )
    yield "</defs>"


def _key(drawing: Drawing) -> Iterator[str]:
    """Explain the looks of the lines that the picture has."""
    x = MARGIN
    for kind in dict.fromkeys(kind for kind in LINES if any(route.kind == kind for route in drawing.routes)):
        yield _route(Route(((x, 66.0), (x + 26.0, 66.0)), kind))
        yield _text(LINES[kind], x + 32.0, 70.0, "small")
        x += 32.0 + text_width(LINES[kind]) + 20.0


def _bands(picture: Picture, drawing: Drawing) -> Iterator[str]:
    """Draw each partition as a tinted band with its title at the left."""
    for band in picture.bands:
        rect = drawing.bands[band.index]
        yield f"<g>{_rect(rect, _tint(band.index, picture), 8)}"
        yield _text(band.title, rect.x + 12, rect.y + 14 + LINE * 0.8, "name")
        for place_, text in enumerate(band.detail.split(" · ") if band.detail else []):
            yield _text(text, rect.x + 12, rect.y + 14 + LINE * (place_ + 1.8), "small")
        yield "</g>"


def _tint(band: int, picture: Picture) -> str:
    """Choose the colours of a band; inputs and output are grey."""
    return "end" if band in (INPUTS, picture.bands[-1].index) else f"tint{band % TINTS}"


def _box(box: Box, rect: Rect, picture: Picture, links: Mapping[str, str]) -> Iterator[str]:
    """Draw one box with its two lines of text; the tooltip says more, and a link leads to its code."""
    link = next((links[name] for name in box.nodes if name in links), "")
    yield f'<a href="{shown(link)}">' if link else "<g>"
    yield f"<title>{shown(box.about)}</title>{_rect(rect, f'box of-{_tint(box.band, picture)}', 5)}"
    yield from _lines([text for text in (box.title, box.detail) if text], rect)
    yield "</a>" if link else "</g>"


def _gate(gate: Net, rect: Rect) -> Iterator[str]:
    """Draw a gate: filled where gradients are decoupled, dashed where there are none."""
    dashed = 'stroke-dasharray="5 3"' if gate.dashed else 'stroke-width="2"'
    area = "box" if gate.dashed else ""
    yield f"<g><title>{shown(gate.about)}</title>"
    yield _rect(rect, f"gate {gate.kind} {area}".rstrip(), 3 if gate.dashed else 12, dashed)
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


def _rect(rect: Rect, look: str, radius: float, more: str = "") -> str:
    """Draw one rectangle."""
    place_ = f'x="{rect.x:.1f}" y="{rect.y:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}"'
    return f'<rect {place_} rx="{radius}" class="{look}" {more}/>'


def _route(route: Route) -> str:
    """Draw one line with rounded corners."""
    dash = ' stroke-dasharray="5 4"' if route.kind == "plain" else ""
    width = "1.3" if route.kind in ("flow", "plain") else "1.8"
    arrow = f' marker-end="url(#dnifx-{route.kind})"' if route.arrow else ""
    path = f'<path d="{_path(route.points)}" class="line {route.kind}" stroke-width="{width}"{dash}{arrow}>'
    return f"{path}<title>{LINES[route.kind]}</title></path>"


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
