"""Reads a page as a browser would: its elements, and what its data say."""

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Reads a page: its elements, their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.inside, []).append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    @property
    def data(self) -> dict[str, Any]:
        """What the page shows."""
        return json.loads(self.texts["script"][0])


def check_data(data: dict[str, Any]) -> None:
    """Every number of an item, a listing, a line or a row has what it names."""
    items, code = data["items"], data["code"]
    parents = {item["p"] for item in items if item["p"] is not None}
    assert all(item["p"] is None or item["p"] < place for place, item in enumerate(items))
    for source, target, look, back in data["flows"]:
        assert not parents & {source, target}
        assert look in ("flow", "plain", "cut", "locked")
        assert back in ("", "synthetic", "target")
    for play in data["plays"]:
        assert {act["r"] for act in play["acts"]} == set(range(len(play["rows"])))
        assert all(items[act["i"]]["k"] in ("partition", "gate") for act in play["acts"])
    places = [each for item in items for each in item["c"]]
    places += [each for play in data["plays"] for act in play["acts"] for each in act["c"]]
    for listing, pieces in places:
        lines = code[listing]["text"].splitlines()
        assert all(1 <= first <= last <= len(lines) for first, last in pieces)
