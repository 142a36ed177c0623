"""Drawing: a cut edge and the way round it, for an error text."""

from collections.abc import Mapping, Sequence

import networkx as nx
from torch import fx

from dnifx.ir import Edge
from dnifx.passes.graph import output_of


def way_round(graph: fx.Graph, uncut: Edge, edges: Sequence[Edge], levels: Mapping[str, int]) -> str:
    """Draw a cut edge and the uncut edge that goes round it."""
    flow = nx.DiGraph((node.name, user.name) for node in graph.nodes for user in node.users)
    behind = [edge for edge in edges if nx.has_path(flow, uncut.source, edge.source)]
    cut = next((edge for edge in behind if levels[edge.source] == levels[uncut.source]), (behind or list(edges))[0])
    meeting = uncut.target if nx.has_path(flow, cut.target, uncut.target) else output_of(graph).name
    lines = [
        f"  cut:    {draw(flow, uncut.source, cut.source)} ==X==> {draw(flow, cut.target, meeting)}",
        f"  round:  {uncut.source} -----> {draw(flow, uncut.target, meeting)}",
    ]
    text = "\n".join(lines)
    return (
        f"the cut {cut} does not separate the model: a value goes round it\n{text}\n"
        f"also cut dnifx.Edge({uncut.source!r}, {uncut.target!r}), or name the module {cut.source!r}: a cut after a module cuts every "
        "value that crosses there"
    )


def draw(flow: nx.DiGraph, source: str, target: str) -> str:
    """Draw a path between two nodes, or both ends where there is none."""
    if source == target:
        return source
    if nx.has_path(flow, source, target):
        return " -> ".join(nx.shortest_path(flow, source, target))
    return target if flow.in_degree(target) else source
