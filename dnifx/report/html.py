"""A program as one HTML file that needs nothing else: fold and unfold modules, search, look at code, play the schedule.

Every name is data here. All of it is one JSON text, in which no ``<`` is left, and the page puts it in as text alone. The
page allows itself nothing but its own script and its own style, by their hashes.
"""

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from dnifx.errors import visible
from dnifx.ir import Program
from dnifx.report.details import Details, details_of
from dnifx.report.items import Item, unfolded
from dnifx.report.listings import Emitted, Lines, Listings, listings_of, pieces
from dnifx.report.plays import Play, plays_of
from dnifx.report.svg import DARK, FONT, LIGHT, TINTS

SCRIPTS = ("dagre.min.js", "model.js", "layout.js", "draw.js", "details.js", "search.js", "play.js", "main.js")
"""The parts of the page's script, in their order."""


def to_html(program: Program, emitted: Sequence[Emitted] = (), plays: Sequence[Play] | None = None) -> str:
    """Return the program as one HTML document, in ASCII.

    Args:
        program: The program, after any pass.
        emitted: The code of each part; without it no code is shown.
        plays: The schedules to play; by default the program's own.
    """
    data = page_data(program, emitted, plays_of(program) if plays is None else plays)
    style = f"{_variables()}\n{_asset('page.css')}"
    script = "\n".join(map(_asset, SCRIPTS))
    allowed = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{allowed}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_ascii(escape(visible(data['title'])))}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            _asset("body.html"),
            f'<script type="application/json" id="data">{embedded(data)}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def page_data(program: Program, emitted: Sequence[Emitted], plays: Sequence[Play]) -> dict[str, Any]:
    """Return everything that the page shows, ready for ``json.dumps``."""
    whole, details, code = unfolded(program), details_of(program), listings_of(program, emitted)
    places = {item.gate.key: place for place, item in enumerate(whole.items) if item.gate is not None}
    places |= {f"{item.band}": place for place, item in enumerate(whole.items) if item.kind == "partition"}
    return {
        "title": whole.title,
        "detail": whole.detail,
        "notes": list(program.notes),
        "items": [_item(item, details, code) for item in whole.items],
        "flows": [[flow.source, flow.target, flow.look, flow.back] for flow in whole.flows],
        "code": [{"title": title, "text": text} for title, text in code.texts],
        "plays": [_play(each, places, code) for each in plays],
    }


def embedded(data: Any) -> str:
    """Return JSON that can stand in a script element: no ``<``, ``>`` or ``&``, and ASCII alone."""
    text = json.dumps(shown(data), ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown(data: Any) -> Any:
    """Return data in which every text is visible: nothing in it turns or hides other text."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, Mapping):
        return {key: shown(value) for key, value in data.items()}
    return [shown(each) for each in data] if isinstance(data, list | tuple) else data


def _item(item: Item, details: Details, code: Listings) -> dict[str, Any]:
    """Describe one box."""
    found: dict[str, Any] = {"k": item.kind, "t": item.title, "d": item.detail, "p": item.parent}
    found["f"] = [list(fact) for fact in details.of(item)]
    found["b"] = item.band
    if item.kind in ("operation", "end"):
        found["n"] = list(item.nodes)
    if item.gate is not None:
        found["l"], found["g"] = list(item.gate.lines), item.gate.kind
    return found | {"c": list(_places(item, code))}


def _places(item: Item, code: Listings) -> Iterator[list[Any]]:
    """Say where an item is in the code: the number of a listing, and the lines."""
    if item.gate is not None:
        yield from (_piece(*each) for each in code.gates.get(item.gate.key, ()))
    elif item.band is not None and item.band in code.bands:
        lines = (
            () if item.kind == "partition" else pieces(code.nodes[name][1] for name in item.nodes if name in code.nodes)
        )
        yield _piece(code.bands[item.band], lines)


def _piece(listing: int, lines: Sequence[Lines]) -> list[Any]:
    """Write a place in the code."""
    return [listing, [list(each) for each in lines]]


def _play(play: Play, places: Mapping[str, int], code: Listings) -> dict[str, Any]:
    """Describe one schedule in time."""
    acts = []
    for act in play.acts:
        pieces_of = code.actions.get(act.name.partition("-")[0])
        acts.append(
            {
                "a": act.name,
                "s": act.says,
                "r": act.row,
                "n": act.step,
                "i": places.get(str(act.key)),
                "x": list(act.costs),
                "y": list(act.turns),
                "c": [_piece(*pieces_of)] if pieces_of else [],
            }
        )
    return {"title": play.title, "rows": list(play.rows), "length": play.length, "acts": acts}


def _asset(name: str) -> str:
    """Read one of the page's own files."""
    return (files("dnifx.report") / "page" / name).read_text(encoding="ascii").strip()


def _hash(text: str) -> str:
    """Return the name of a text in a content security policy."""
    return f"'sha256-{b64encode(sha256(text.encode('ascii')).digest()).decode('ascii')}'"


def _ascii(text: str) -> str:
    """Write letters outside of ASCII as references."""
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _variables() -> str:
    """Write the colours of the pictures as variables of the style, for light and dark pages."""
    light, dark = _colours(LIGHT), _colours(DARK)
    chosen = f':root[data-theme="dark"]{{{dark}}}'
    return f':root{{--font:{FONT};{light}}}\n@media (prefers-color-scheme:dark){{:root:not([data-theme="light"]){{{dark}}}}}\n{chosen}'


def _colours(colours: Mapping[str, str]) -> str:
    """Write one set of colours; areas have a second one, for their frame."""
    tints = ("end", *(f"tint{number}" for number in range(TINTS)))
    pairs = [(name, colours[name]) for name in colours if name not in tints]
    for name in tints:
        area, frame = colours[name].split()
        pairs += [(name, area), (f"{name}-frame", frame)]
    return "".join(f"--{name}:{value};" for name, value in pairs)
