"""The graph in the form that Google's Model Explorer opens: nodes in nested layers, with what is known of each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dnifx.errors import visible
from dnifx.ir import Program
from dnifx.report.details import Details, Fact, details_of
from dnifx.report.facts import value_facts
from dnifx.report.items import Item, unfolded

LAYERS = ("partition", "module")
SEVERAL = "several"
"""The kinds of items that are layers, and the kind that only saves room in a picture."""

STYLES = {
    "gate": {"backgroundColor": "#fff1e0", "borderColor": "#b34700"},
    "end": {"backgroundColor": "#f1f3f5", "borderColor": "#c3c9d0"},
}
"""How cuts, inputs and outputs look."""


def graph_collection(program: Program) -> dict[str, Any]:
    """Return the graph as one graph collection of Model Explorer, ready for ``json.dumps``.

    Partitions and modules are layers. A cut is a node between partitions, with what is known of its estimator.
    """
    whole, details = unfolded(program), details_of(program)
    layers = layers_of(whole.items)
    sources: dict[int, list[int]] = {}
    for flow in whole.flows:
        sources.setdefault(flow.target, []).append(flow.source)
    nodes = [
        {
            "id": str(place),
            "label": visible(item.title),
            "namespace": layers[place],
            "attrs": attributes(details.of(item)),
            "incomingEdges": edges(sources.get(place, [])),
            "outputsMetadata": [{"id": "0", "attrs": attributes([("shape", shape(item, details))])}],
        }
        | ({"style": STYLES[item.kind]} if item.kind in STYLES else {})
        for place, item in enumerate(whole.items)
        if item.kind not in (*LAYERS, SEVERAL)
    ]
    held = {
        layers[place]: dict(merged(details.of(item))) for place, item in enumerate(whole.items) if item.kind in LAYERS
    }
    graph = {"id": visible(whole.title), "nodes": nodes, "groupNodeAttributes": held}
    return {"label": visible(whole.title), "graphs": [graph]}


def layers_of(items: Sequence[Item]) -> list[str]:
    """Return the layer that each item is, or lies in, after the names of those around it: ``submod_0/encoder/layers.0``.

    Calls of one module that stand apart are layers of their own. Consecutive items that a picture groups to save room are none.
    """
    found: list[str] = []
    calls: Counter[str] = Counter()
    for item in items:
        around = "" if item.parent is None else found[item.parent]
        if item.kind in LAYERS:
            name = visible(item.title).replace("/", "|")
            around = f"{around}/{name}" if around else name
            calls[around] += 1
            around += f" (call {calls[around]})" if calls[around] > 1 else ""
        found.append(around)
    return found


def edges(sources: Sequence[int]) -> list[dict[str, str]]:
    """Return the ways that lead to an item from others."""
    return [
        {"sourceNodeId": str(source), "sourceNodeOutputId": "0", "targetNodeInputId": str(number)}
        for number, source in enumerate(sources)
    ]


def shape(item: Item, details: Details) -> str:
    """Return the tensors that an item makes, or that cross a cut."""
    if item.gate is not None:
        line = next((line for line in details.facts.boundaries if item.gate.key == f"cut_{line.index}"), None)
        return ", ".join(value.text for value in line.values) if line is not None else ""
    return ", ".join(value_facts(details.program, name).text for name in item.nodes)


def attributes(facts: Sequence[Fact]) -> list[dict[str, str]]:
    """Return facts as attributes."""
    return [{"key": key, "value": value} for key, value in merged(facts)]


def merged(facts: Sequence[Fact]) -> Iterator[Fact]:
    """Yield facts, those of one label together, since an attribute has one value."""
    for key in dict.fromkeys(key for key, _ in facts):
        yield key, "\n".join(visible(value) for each, value in facts if each == key)
