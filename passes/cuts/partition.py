"""Partition: every node gets one partition; the partitions are convex and their graph is acyclic.

Each cut divides the graph into the nodes that its values are computed from and the rest. The level of a node is the number
of cuts before it. Connected nodes of one level form a partition. So a path that leaves a partition has reached a higher
level, and never comes back.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import ClassVar

import networkx as nx
from networkx.utils import UnionFind
from torch import fx

from dnifx.errors import CutError, PassError
from dnifx.ir import Cut, Edge, Program
from dnifx.passes.cuts.drawing import way_round
from dnifx.passes.graph import captured, computing, described, memory_outside, memory_read, memory_written, output_of
from dnifx.passes.measure import differentiable, has_gradient
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
    for node in computing(graph):
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
    paths = {path for path, _ in program.model.named_modules()}
    for node in computing(captured(program)):
        reads = [source for source in node.all_input_nodes if source.op == "get_attr"]
        modules = [read for read in (node, *reads) if read.op == "call_module" or read.target in paths]
        keys = [f"module {module.target}" for module in modules]
        keys += ["random"] if program.measures[node.name].random else []
        for key in keys:
            if key in last:
                pairs.append((last[key], node))
            last[key] = node
    return pairs + write_pairs(program)


def write_pairs(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Pair each in-place write to an input, parameter or buffer with the reads of that memory before and after it."""
    pairs, outside = [], memory_outside(program)
    writer: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = {}
    for node in computing(captured(program)):
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


def cut_levels(program: Program) -> dict[str, int]:
    """Return the level of each node: the number of cuts before it, or more where it can be computed with its users.

    A node stays at its earliest level if a cut of that level is computed from it. Every other node with a gradient moves to
    the level of its earliest user. Values without a gradient (sizes, masks) stay early: it is cheaper to send a size than
    the tensor that it is read from.
    """
    graph = captured(program)
    crossed = crossings(graph, program.cuts)
    order = nx.DiGraph(ordered_pairs(program))
    early: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            least = [early.get(source, 0) + crossed(source, node) for source in node.all_input_nodes]
            early[node] = max([*least, *(early[other] for other in order.pred.get(node, ()))], default=0)
    sources = {name for cut in program.cuts for name in (*cut.nodes, *(edge.source for edge in cut.edges))}
    live = ancestors([output_of(graph)])
    levels: dict[str, int] = {}
    latest: dict[fx.Node, float] = {}
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in early:
            continue
        followers = [user for user in (*node.users, *order.succ.get(node, ())) if user in early]
        latest[node] = min((latest[user] for user in followers), default=inf)
        if node not in live:
            continue
        if node.name in sources or any(user in needed and early[user] == early[node] for user in followers):
            needed.add(node)
        stays = node in needed or latest[node] == inf or not program.measures[node.name].requires_grad
        levels[node.name] = early[node] if stays else int(latest[node])
        latest[node] = levels[node.name]
    for node in early:
        if node not in live:
            earlier = [*node.all_input_nodes, *order.pred.get(node, ())]
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
    join_without_gradient(program, levels, joined, live, nx.DiGraph(pairs))
    return without_cycles(program, joined)


def join_without_gradient(
    program: Program,
    levels: Mapping[str, int],
    joined: UnionFind,
    live: AbstractSet[fx.Node],
    order: nx.DiGraph,
) -> None:
    """Join each component without gradient to those of its users, or of the nodes that have to follow it, at the lowest level.

    One that nothing follows joins the last component that it is computed from, or has to follow. One that reads inputs alone,
    such as a guard on their sizes, joins the first component with a gradient, so that it fires early.
    """
    nodes = partitioned(captured(program))
    flowing = [node for node in nodes if node in live and (node.op == "output" or has_gradient(program, node))]
    level_of = {joined[node.name]: levels[node.name] for node in flowing}
    members: dict[str, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(joined[node.name], []).append(node)
    for followed in (True, False):
        hosts = {} if followed else latest_sources(nodes, joined, level_of, order)
        for node in reversed(nodes):
            root = joined[node.name]
            if root in level_of:
                continue
            later = [user for member in members[root] for user in (*member.users, *order.succ.get(member, ()))]
            others = [user for user in later if joined[user.name] in level_of]
            if not followed and all(joined[user.name] == root for user in later):
                others = [hosts.get(root) or min(flowing, key=lambda each: levels[each.name])]
            level = min((level_of[joined[other.name]] for other in others), default=0)
            for other in [other for other in others if level_of[joined[other.name]] == level]:
                joined.union(other.name, node.name)
                level_of[joined[node.name]] = level


def latest_sources(
    nodes: Sequence[fx.Node], joined: UnionFind, level_of: Mapping[str, int], order: nx.DiGraph
) -> dict[str, fx.Node]:
    """Return, for each component without a level, the node of the highest level that it is computed from or has to follow."""
    found: dict[str, fx.Node] = {}
    for node in nodes:
        root = joined[node.name]
        if root not in level_of:
            earlier = [each for each in (*node.all_input_nodes, *order.pred.get(node, ())) if each.op != "placeholder"]
            hosts = [each if joined[each.name] in level_of else found.get(joined[each.name]) for each in earlier]
            placed = [each for each in (found.get(root), *hosts) if each is not None]
            if placed:
                found[root] = max(placed, key=lambda each: (level_of[joined[each.name]], each))
    return found


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


def without_cycles(program: Program, joined: UnionFind) -> UnionFind:
    """Join components that would have to run before each other, and what would run after the output's to the output's.

    Raises:
        CutError: That would join the two sides of a cut.
    """
    crossing = [(cut, *edge) for cut in program.cuts for edge in gradient_edges(program, cut)]
    while True:
        order, last = component_graph(program, joined), joined[output_of(captured(program)).name]
        groups = [*nx.strongly_connected_components(order), {last, *nx.descendants(order, last)}]
        group_of = {root: index for index, group in enumerate(groups) for root in group}
        for cut, source, target in crossing:
            if group_of[joined[source.name]] == group_of[joined[target.name]]:
                raise CutError(lost_cut(program, cut, source, target, joined))
        if all(len(group) == 1 for group in groups):
            return joined
        for group in groups:
            joined.union(*group)


def gradient_edges(program: Program, cut: Cut) -> list[tuple[fx.Node, fx.Node]]:
    """Return the edges over which a gradient crosses a cut."""
    graph, live = captured(program), differentiable(program)
    crossed, sources = crossings(graph, (cut,)), {*cut.nodes, *(edge.source for edge in cut.edges)}
    nodes = [node for node in graph.nodes if node.name in sources and node in live]
    return [(node, user) for node in nodes for user in node.users if user in live and crossed(node, user)]


def lost_cut(program: Program, cut: Cut, source: fx.Node, target: fx.Node, joined: UnionFind) -> str:
    """Return the error text for a cut whose two sides have to be one partition: which nodes join them."""
    order = component_graph(program, joined)
    path = nx.shortest_path(order, joined[target.name], joined[source.name])
    hops = [order.edges[pair]["nodes"] for pair in pairwise(path)]
    steps = [f"{described(first)} runs before {described(second)}" for first, second in hops]
    return (
        f"the cut {cut.name} cannot be made: {described(target)} is behind it, and has to be in the partition of {described(source)}, "
        f"which is before it{': ' if steps else ''}{', '.join(steps)}; cut elsewhere, or leave this cut out"
    )


def component_graph(program: Program, joined: UnionFind) -> nx.DiGraph:
    """Return the graph of components, with an edge to each from those that have to run before it; it holds the nodes that do."""
    nodes = partitioned(captured(program))
    found = nx.DiGraph()
    found.add_nodes_from(joined[node.name] for node in nodes)
    for first, second in (*((node, user) for node in nodes for user in node.users), *ordered_pairs(program)):
        if joined[first.name] != joined[second.name]:
            found.add_edge(joined[first.name], joined[second.name], nodes=(first, second))
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
