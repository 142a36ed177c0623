"""Same partitions: the nodes of another input kind get the partitions that the first input kind has."""

from collections import Counter, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx
from torch import fx

from dnifx.errors import CutError
from dnifx.ir import Cut, Edge, Program, module_path
from dnifx.passes.cuts.calls import calls_by_path
from dnifx.passes.cuts.partition import ordered_pairs, with_reads
from dnifx.passes.graph import INSERTED, captured, computing, output_of
from dnifx.passes.pipeline import Pass

Place = tuple[str, str, str]
"""The call of a module that a node lies in, the module's path, and what the node does."""


@dataclass(frozen=True)
class SamePartitions(Pass):
    """Give every node the partition of the matching node in an earlier compilation of the same model.

    The graphs differ: evaluation has no dropout, other sizes may take another branch. What both graphs do, they do in the
    same modules and in the same order.

    Attributes:
        first: The earlier program.
    """

    first: Program
    name: ClassVar[str] = "same_partitions"
    requires: ClassVar[tuple[str, ...]] = ("graph", "measures")
    ensures: ClassVar[tuple[str, ...]] = ("cuts", "levels", "partition_of")

    def run(self, program: Program) -> Program:
        """Match the nodes of both graphs, and cut in the same places.

        Raises:
            CutError: A value would flow back to an earlier partition.
        """
        first, graph = captured(self.first), captured(program)
        same = matching_nodes(first, graph)
        partition_of, levels = (
            inherited(graph, same, around_nodes(first, graph, each), each)
            for each in (self.first.partition_of, self.first.levels)
        )
        partition_of = with_order_kept(program, partition_of)
        found = {name: node for node, name in same.items()}
        cuts = tuple(matching_cut(cut, found, partition_of, self.first.partition_of) for cut in self.first.cuts)
        return replace(program, cuts=cuts, levels=levels, partition_of=partition_of)


def matching_nodes(first: fx.Graph, graph: fx.Graph) -> Mapping[str, str]:
    """Return the name of the matching node in the first graph, for each node of another graph that has one.

    Nodes match if they do the same, in the same call of the same module, on matching arguments. Arguments may fail to match,
    as where a dropout before the node is gone. Then its number among the nodes that do the same there decides, if both
    graphs have equally many of these.
    """
    own = {node.name: node.meta.get(INSERTED, node.name) for node in first.nodes}
    before, now = places(first), places(graph)
    by_arguments: dict[Hashable, deque[str]] = {}
    for node, place, _ in before:
        by_arguments.setdefault((place, arguments_of(node, own)), deque()).append(node.name)
    counts = Counter(place for _, place, _ in before), Counter(place for _, place, _ in now)
    known = {(place, number): node.name for node, place, number in before}
    found: dict[str, str] = {}
    taken: set[str] = set()
    for node, place, number in now:
        same = by_arguments.get((place, arguments_of(node, found)), deque())
        if not same and counts[0][place] == counts[1][place]:
            same = deque([known[place, number]])
        while same and same[0] in taken:
            same.popleft()
        if same:
            found[node.name] = same.popleft()
            taken.add(found[node.name])
    return found


def arguments_of(node: fx.Node, names: Mapping[str, str]) -> str:
    """Return a node's arguments as text, with the given names for the nodes that compute."""

    def named(source: fx.Node) -> str:
        return names.get(source.name, "?") if source.op.startswith("call") else f"{source.op} {source.target}"

    return repr(fx.node.map_arg((node.args, node.kwargs), named))


def places(graph: fx.Graph) -> list[tuple[fx.Node, Place, int]]:
    """Return each captured computing node with its place, and how many nodes of that place come before it."""
    seen: Counter[Place] = Counter()
    found = []
    for node in computing(graph):
        if not node.meta.get(INSERTED):
            stack = node.meta.get("nn_module_stack") or {}
            does = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            place = (next(reversed(stack), ""), module_path(node), str(does))
            found.append((node, place, seen[place]))
            seen[place] += 1
    return found


def around_nodes(first: fx.Graph, graph: fx.Graph, partition_of: Mapping[str, int]) -> dict[str, int]:
    """Return, for each node, the partition of the innermost module call around it, if one partition had that call in the first graph.

    A module that is one node now and was opened in the first graph has the partition of its last node there.
    """
    calls = calls_by_path(first).items()
    known = {path: [partition_of[node.name] for node in nodes if not node.meta.get(INSERTED)] for path, nodes in calls}
    found: dict[str, int] = {}
    for path, nodes in sorted(calls_by_path(graph).items(), key=lambda call: call[0].count(".")):
        for node in nodes if path in known else ():
            if len(set(known[path])) == 1 or path.partition("@")[0] == node.target:
                found[node.name] = known[path][-1]
    return found


def inherited(
    graph: fx.Graph, same: Mapping[str, str], around: Mapping[str, int], partition_of: Mapping[str, int]
) -> dict[str, int]:
    """Return the partition (or level) of each node: that of the matching node, else of the module around it or of its arguments.

    Args:
        graph: The graph whose nodes are placed.
        same: The name of the matching node in the first graph.
        around: The partition of the module around a node.
        partition_of: The partition of each node of the first graph.

    Raises:
        CutError: A value would flow back.
    """
    found: dict[str, int] = {}
    for node in computing(graph):
        least = max((found.get(source.name, 0) for source in node.all_input_nodes), default=0)
        found[node.name] = partition_of.get(same.get(node.name, ""), max(least, around.get(node.name, 0)))
        if found[node.name] < least:
            raise CutError(
                f"{node.name} belongs to partition {found[node.name]} of the first input kind, but reads a value of partition {least}"
            )
    found[output_of(graph).name] = max(partition_of.values())
    return with_reads(graph, found)


def with_order_kept(program: Program, partition_of: Mapping[str, int]) -> dict[str, int]:
    """Move unused random draws to later partitions where that keeps the order of all draws and writes.

    Raises:
        CutError: A node that cannot be moved would run before another that the model runs first.
    """
    before, found = nx.DiGraph(ordered_pairs(program)).pred, dict(partition_of)
    for node in captured(program).nodes:
        follows = max((found[other.name] for other in before.get(node, ())), default=0)
        if follows > found.get(node.name, follows):
            if node.users or program.measures[node.name].writes:
                raise CutError(
                    f"{node.name} belongs to partition {found[node.name]} of the first input kind, but draws random numbers or "
                    f"writes after a node of partition {follows}"
                )
            found[node.name] = follows
    return found


def matching_cut(cut: Cut, found: Mapping[str, str], partition_of: Mapping[str, int], first: Mapping[str, int]) -> Cut:
    """Return a cut after the matching nodes; the last node of a partition replaces a node without match.

    Raises:
        CutError: Nothing of the cut is left.
    """

    def match(name: str) -> str | None:
        last = next((node for node in reversed(list(partition_of)) if partition_of[node] == first.get(name)), None)
        return found.get(name, last)

    nodes = tuple(name for name in map(match, cut.nodes) if name is not None)
    edges = tuple(
        Edge(found[edge.source], found[edge.target]) for edge in cut.edges if {edge.source, edge.target} <= set(found)
    )
    if not nodes and not edges:
        raise CutError(f"the cut {cut.name} has no place in the graph of this input kind")
    return replace(cut, nodes=nodes, edges=edges)
