"""Partition: every node gets one partition; the partitions are convex and their graph is acyclic.

Each cut divides the graph into the nodes that its values are computed from and the rest. The level of a node is the number
of cuts before it. Connected nodes of one level form a partition. So a path that leaves a partition has reached a higher
level, and never comes back.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx
from networkx.utils import UnionFind
from torch import fx

from dnifx.errors import CutError, PassError
from dnifx.ir import Cut, Edge, Program
from dnifx.passes.cuts.balance import execution_order
from dnifx.passes.graph import captured, memory_read, memory_written, output_of
from dnifx.passes.pipeline import Pass
from dnifx.runtime.emitted.checkpoints import regions_of


@dataclass(frozen=True)
class FormPartitions(Pass):
    """Give every node its partition."""

    name: ClassVar[str] = "partition"
    requires: ClassVar[tuple[str, ...]] = ("graph", "measures", "cuts")
    ensures: ClassVar[tuple[str, ...]] = ("levels", "partition_of")

    def run(self, program: Program) -> Program:
        """Find the level of each node, check exact edges, and number the partitions in the order of execution."""
        graph = captured(program)
        if program.cuts[0].level is not None:
            levels = prefix_levels(graph, program.cuts)
            return replace(program, levels=levels, partition_of=levels)
        levels = cut_levels(program)
        check_exact_edges(program, levels)
        return replace(program, levels=levels, partition_of=numbered(program, components(program, levels)))

    def check(self, program: Program) -> None:
        """Every node but the inputs has one partition, no value flows to an earlier one, and the output's is the last."""
        for node in partitioned(captured(program)):
            if node.name not in program.partition_of:
                raise PassError(f"partition gave node {node.name} no partition")
            for user in node.users:
                if program.partition_of[node.name] > program.partition_of[user.name]:
                    raise PassError(f"a value flows back to an earlier partition: {node.name} -> {user.name}")
        if program.partition_of[output_of(captured(program)).name] != max(program.partition_of.values()):
            raise PassError("there is a partition behind the output's")


def partitioned(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that get a partition: all but the inputs."""
    return [node for node in graph.nodes if node.op != "placeholder"]


def prefix_levels(graph: fx.Graph, cuts: Sequence[Cut]) -> dict[str, int]:
    """Return the level of each node for cuts given as a number, which are prefixes of the execution order."""
    last = {cut.nodes[0] for cut in cuts}
    levels: dict[str, int] = {}
    level = 0
    for node in execution_order(graph):
        levels[node.name] = level
        level += node.name in last
    levels[output_of(graph).name] = level
    return with_reads(graph, levels)


def with_reads(graph: fx.Graph, levels: dict[str, int]) -> dict[str, int]:
    """Give each read of a parameter, buffer or constant the level of the node that uses it."""
    for node in graph.nodes:
        if node.op == "get_attr":
            levels[node.name] = min((levels[user.name] for user in node.users), default=0)
    return levels


def ordered_pairs(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Return pairs of nodes that have to keep their order although no value flows between them.

    Both draw random numbers, or both call the same module, whose buffers they may update, or one of them writes in place to
    memory of an input, parameter or buffer that the other reads.
    """
    pairs = []
    last: dict[str, fx.Node] = {}
    for node in captured(program).nodes:
        if not node.op.startswith("call"):
            continue
        keys = [f"module {node.target}"] if node.op == "call_module" else []
        keys += ["random"] if program.measures[node.name].random else []
        for key in keys:
            if key in last:
                pairs.append((last[key], node))
            last[key] = node
    return pairs + write_pairs(program)


def write_pairs(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Pair each in-place write to an input, parameter or buffer with the reads of that memory before and after it."""
    nodes = captured(program).nodes
    sources = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    outside = {storage for node in sources for storage in program.measures[node.name].storages}
    pairs = []
    writer: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = {}
    for node in nodes:
        if not node.op.startswith("call"):
            continue
        writes = memory_written(program, node)
        for storage in memory_read(program, node) & outside:
            if storage in writer:
                pairs.append((writer[storage], node))
            if storage in writes:
                pairs += [(reader, node) for reader in readers.pop(storage, [])]
                writer[storage] = node
            else:
                readers.setdefault(storage, []).append(node)
    return pairs


def neighbours(pairs: Iterable[tuple[fx.Node, fx.Node]], reverse: bool = False) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, those that have to come after it (or before it)."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for first, second in pairs:
        key, value = (second, first) if reverse else (first, second)
        found.setdefault(key, []).append(value)
    return found


def cut_levels(program: Program) -> dict[str, int]:
    """Return the level of each node: the number of cuts before it, or more where it can be computed with its users.

    A node stays at its earliest level if a cut of that level is computed from it. Every other node with a gradient moves to
    the level of its earliest user. Values without a gradient (sizes, masks) stay early: it is cheaper to send a size than
    the tensor that it is read from.
    """
    graph = captured(program)
    crossed = crossings(graph, program.cuts)
    pairs = ordered_pairs(program)
    before, after = neighbours(pairs, reverse=True), neighbours(pairs)
    early: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            least = [early.get(source, 0) + crossed(source, node) for source in node.all_input_nodes]
            early[node] = max([*least, *(early[other] for other in before.get(node, ()))], default=0)
    sources = {name for cut in program.cuts for name in (*cut.nodes, *(edge.source for edge in cut.edges))}
    live = ancestors([output_of(graph)])
    levels: dict[str, int] = {}
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in early or node not in live:
            continue
        users = [user for user in (*node.users, *after.get(node, ())) if user in early and user in live]
        if node.name in sources or any(user in needed and early[user] == early[node] for user in users):
            needed.add(node)
        stays = node in needed or not users or not program.measures[node.name].requires_grad
        levels[node.name] = early[node] if stays else min(levels[user.name] for user in users)
    for node in early:
        if node not in live:
            earlier = [*node.all_input_nodes, *before.get(node, ())]
            levels[node.name] = max([early[node], *(levels[other.name] for other in earlier if other.name in levels)])
    return with_reads(graph, levels)


def ancestors(nodes: Iterable[fx.Node], first: fx.Node | None = None) -> set[fx.Node]:
    """Return nodes and all that they are computed from; with ``first``, only as far back as that node."""
    found = set(nodes)
    queue = list(found)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in found and not (first is not None and source < first):
                found.add(source)
                queue.append(source)
    return found


def crossings(graph: fx.Graph, cuts: Sequence[Cut]) -> Callable[[fx.Node, fx.Node], int]:
    """Return a function that counts the cuts which the edge from one node to another crosses."""
    before: dict[fx.Node, list[set[fx.Node]]] = {}
    edges = {(edge.source, edge.target) for cut in cuts for edge in cut.edges}
    nodes = {node.name: node for node in graph.nodes}
    for cut in cuts:
        ends = [nodes[name] for name in cut.nodes]
        inside = ancestors(ends, min(ends)) if ends else set()
        for node in ends:
            before.setdefault(node, []).append(inside)

    def count(source: fx.Node, target: fx.Node) -> int:
        after = sum(target not in inside for inside in before.get(source, ()))
        return after + ((source.name, target.name) in edges)

    return count


def components(program: Program, levels: Mapping[str, int]) -> UnionFind:
    """Join neighbours of one level. Join a component without gradient to the nodes that first use it or have to follow it."""
    graph = captured(program)
    nodes = partitioned(graph)
    joined = UnionFind(node.name for node in nodes)
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op != "placeholder" and (source.op == "get_attr" or levels[source.name] == levels[node.name]):
                joined.union(source.name, node.name)
    live = ancestors([output_of(graph)])
    beside = {node: region_neighbour(program, node) for node in nodes if node not in live and regions_of(node)}
    for node, other in beside.items():
        if other is not None:
            joined.union(node.name, other.name)
    pairs = ordered_pairs(program)
    for first, second in pairs:
        if second not in live and not beside.get(second) and levels[first.name] == levels[second.name]:
            joined.union(first.name, second.name)
    join_without_gradient(program, levels, joined, live, neighbours(pairs))
    return without_cycles(program, joined)


def join_without_gradient(
    program: Program,
    levels: Mapping[str, int],
    joined: UnionFind,
    live: AbstractSet[fx.Node],
    after: Mapping[fx.Node, Sequence[fx.Node]],
) -> None:
    """Join each component without gradient to those of its users, or of the nodes that have to follow it, at the lowest level."""
    graph = captured(program)
    flowing = {joined[node.name] for node in live if node.op == "output" or has_gradient(program, node)}
    members: dict[str, list[fx.Node]] = {}
    for node in partitioned(graph):
        members.setdefault(joined[node.name], []).append(node)
    for node in reversed(graph.nodes):
        if node.op == "placeholder" or joined[node.name] in flowing:
            continue
        later = [user for member in members[joined[node.name]] for user in (*member.users, *after.get(member, ()))]
        users = [user for user in later if joined[user.name] != joined[node.name]]
        first_level = min((levels[user.name] for user in users), default=-1)
        followers = [user for user in users if levels[user.name] == first_level]
        for user in followers or [host_of_unused(program, node, joined)]:
            joined.union(user.name, node.name)
        flowing.add(joined[node.name])


def host_of_unused(program: Program, node: fx.Node, joined: UnionFind) -> fx.Node:
    """Return the node whose partition takes an unused node: for a guard on the inputs the first one, so that it fires early."""
    graph = captured(program)
    sources = [s for s in node.all_input_nodes if s.op.startswith("call") and joined[s.name] != joined[node.name]]
    first = next((each for each in graph.nodes if has_gradient(program, each)), None)
    return output_of(graph) if sources or first is None else first


def region_neighbour(program: Program, node: fx.Node) -> fx.Node | None:
    """Return the node whose partition takes an unused write of a checkpointed region: the write is repeated with the region."""
    sources = [source for source in node.all_input_nodes if source.op.startswith("call")]
    found = [max(sources)] if sources else [each for each in region_around(node) if has_gradient(program, each)]
    writes = bool(program.measures[node.name].writes)
    return found[0] if found and writes and regions_of(found[0]) == regions_of(node) else None


def region_around(node: fx.Node) -> list[fx.Node]:
    """Return the nodes around a node in the same checkpointed regions: those before it, then those after it, nearest first."""
    found = []
    for step in (operator.attrgetter("prev"), operator.attrgetter("next")):
        each = step(node)
        while regions_of(each) == regions_of(node):
            found.append(each)
            each = step(each)
    return found


def has_gradient(program: Program, node: fx.Node) -> bool:
    """Whether a node computes a value with a gradient."""
    return node.op.startswith("call") and program.measures[node.name].requires_grad


def without_cycles(program: Program, joined: UnionFind) -> UnionFind:
    """Join components that would have to run before each other, and what would run after the output's to the output's."""
    while True:
        order, last = component_graph(program, joined), joined[output_of(captured(program)).name]
        groups = [*nx.strongly_connected_components(order), {last, *nx.descendants(order, last)}]
        if all(len(group) == 1 for group in groups):
            return joined
        for group in groups:
            joined.union(*group)


def component_graph(program: Program, joined: UnionFind) -> nx.DiGraph:
    """Return the graph of components, with an edge to each from those that have to run before it."""
    nodes = partitioned(captured(program))
    flow = [(node, user) for node in nodes for user in node.users]
    ends = [(joined[first.name], joined[second.name]) for first, second in (*flow, *ordered_pairs(program))]
    found = nx.DiGraph((first, second) for first, second in ends if first != second)
    found.add_nodes_from(joined[node.name] for node in nodes)
    return found


def numbered(program: Program, joined: UnionFind) -> dict[str, int]:
    """Number the components in a topological order that keeps to the order of execution."""
    nodes = partitioned(captured(program))
    first: dict[str, int] = {}
    for index, node in enumerate(nodes):
        first.setdefault(joined[node.name], index)
    first[joined[output_of(captured(program)).name]] = len(nodes)
    sequence = nx.lexicographical_topological_sort(component_graph(program, joined), key=first.__getitem__)
    order = {root: index for index, root in enumerate(sequence)}
    return {node.name: order[joined[node.name]] for node in nodes}


def check_exact_edges(program: Program, levels: Mapping[str, int]) -> None:
    """Refuse cut edges where a value with a gradient goes round them.

    Raises:
        CutError: The text draws the cut and the way round it.
    """
    named = {(edge.source, edge.target): edge for cut in program.cuts for edge in cut.edges}
    if not named:
        return
    after_nodes = {levels[name] for cut in program.cuts for name in cut.nodes}
    for node in partitioned(captured(program)):
        for user in node.users:
            crossed = range(levels[node.name], levels[user.name])
            exact = crossed and not any(level in after_nodes for level in crossed)
            if exact and user.op != "output" and has_gradient(program, node) and (node.name, user.name) not in named:
                raise CutError(way_round(captured(program), Edge(node.name, user.name), list(named.values()), levels))


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
