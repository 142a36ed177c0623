"""Same partitions: another input kind of a model gets the partitions of the first one, node by node."""

from collections import Counter, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from dnifx.errors import CutError
from dnifx.ir import Cut, Edge, Program
from dnifx.passes.cuts.partition import neighbours, ordered_pairs, with_reads
from dnifx.passes.cuts.resolve import calls_by_path
from dnifx.passes.graph import INSERTED, captured, module_path, output_of
from dnifx.passes.pipeline import Pass

Place = tuple[str, str, str]


@dataclass(frozen=True)
class SamePartitions(Pass):
    """Give every node the partition that its like has in an earlier compilation of the same model.

    Evaluation leaves the dropouts of training out, other sizes take another way; what both do, they do in the same modules in
    the same order.

    Attributes:
        first: The earlier program.
    """

    first: Program
    name: ClassVar[str] = "same_partitions"
    requires: ClassVar[tuple[str, ...]] = ("graph", "measures")
    ensures: ClassVar[tuple[str, ...]] = ("cuts", "levels", "partition_of")

    def run(self, program: Program) -> Program:
        """Find the like of each node, and cut where it was cut.

        Raises:
            CutError: A value would flow back to an earlier partition.
        """
        first, graph = captured(self.first), captured(program)
        same = likes(first, graph)
        partition_of, levels = (
            inherited(graph, same, standing(first, graph, each), each)
            for each in (self.first.partition_of, self.first.levels)
        )
        partition_of = in_order(program, partition_of)
        found = {name: node for node, name in same.items()}
        cuts = tuple(moved(cut, found, partition_of, self.first.partition_of) for cut in self.first.cuts)
        return replace(program, cuts=cuts, levels=levels, partition_of=partition_of)


def likes(first: fx.Graph, graph: fx.Graph) -> Mapping[str, str]:
    """Return the name of the node in the first graph that each node of another graph is like.

    A node is like one that does the same, in the same call of the same module, with the likes of what it reads. Where none
    does, and both graphs do this equally often there, its place among those tells; it does where a dropout before it is gone.
    """
    own = {node.name: node.meta.get(INSERTED, node.name) for node in first.nodes}
    before, now = places(first), places(graph)
    reading: dict[Hashable, deque[str]] = {}
    for node, place, _ in before:
        reading.setdefault((place, reads(node, own)), deque()).append(node.name)
    often = Counter(place for _, place, _ in before), Counter(place for _, place, _ in now)
    known = {(place, number): node.name for node, place, number in before}
    found: dict[str, str] = {}
    taken: set[str] = set()
    for node, place, number in now:
        same = reading.get((place, reads(node, found)), deque())
        if not same and often[0][place] == often[1][place]:
            same = deque([known[place, number]])
        while same and same[0] in taken:
            same.popleft()
        if same:
            found[node.name] = same.popleft()
            taken.add(found[node.name])
    return found


def reads(node: fx.Node, names: Mapping[str, str]) -> str:
    """Return a node's arguments as text, with the given names for the nodes that compute."""

    def named(source: fx.Node) -> str:
        return names.get(source.name, "?") if source.op.startswith("call") else f"{source.op} {source.target}"

    return repr((fx.node.map_arg(node.args, named), fx.node.map_arg(node.kwargs, named)))


def places(graph: fx.Graph) -> list[tuple[fx.Node, Place, int]]:
    """Return where each captured computing node stands: the call of its module, what it does, and how often that was done before."""
    seen: Counter[Place] = Counter()
    found = []
    for node in graph.nodes:
        if node.op.startswith("call") and not node.meta.get(INSERTED):
            stack = node.meta.get("nn_module_stack") or {}
            does = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            place = (next(reversed(stack), ""), module_path(node), str(does))
            found.append((node, place, seen[place]))
            seen[place] += 1
    return found


def standing(first: fx.Graph, graph: fx.Graph, partition_of: Mapping[str, int]) -> dict[str, int]:
    """Return where the innermost module call around each node stands that had, in the first graph, all its nodes in one place.

    A module that is one node now, and was looked into before, stands where its last node did.
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
    graph: fx.Graph, same: Mapping[str, str], near: Mapping[str, int], partition_of: Mapping[str, int]
) -> dict[str, int]:
    """Return the partition (or level) of each node: its like's; where it has none, that of the module around it, or of what it reads.

    Args:
        graph: What is placed.
        same: The name of the node that each is like, in the first graph.
        near: Where the module around a node stood.
        partition_of: Of the first graph's nodes.

    Raises:
        CutError: A value would flow back.
    """
    found: dict[str, int] = {}
    for node in graph.nodes:
        if not node.op.startswith("call"):
            continue
        least = max((found.get(source.name, 0) for source in node.all_input_nodes), default=0)
        found[node.name] = partition_of.get(same.get(node.name, ""), max(least, near.get(node.name, 0)))
        if found[node.name] < least:
            raise CutError(
                f"{node.name} belongs to partition {found[node.name]} of the first input kind, but reads of {least}"
            )
    found[output_of(graph).name] = max(partition_of.values())
    return with_reads(graph, found)


def in_order(program: Program, partition_of: Mapping[str, int]) -> dict[str, int]:
    """Return the partitions with numbers that are drawn and not used moved back, so that all draws keep their order.

    Raises:
        CutError: A node that cannot be moved would run before another that the model runs first.
    """
    before, found = neighbours(ordered_pairs(program), reverse=True), dict(partition_of)
    for node in captured(program).nodes:
        follows = max((found[other.name] for other in before.get(node, ())), default=0)
        if follows > found.get(node.name, follows):
            if node.users or program.measures[node.name].writes:
                raise CutError(
                    f"{node.name} belongs to partition {found[node.name]} of the first input kind, but draws random numbers or "
                    f"writes after one of partition {follows}"
                )
            found[node.name] = follows
    return found


def moved(cut: Cut, found: Mapping[str, str], partition_of: Mapping[str, int], first: Mapping[str, int]) -> Cut:
    """Return a cut after the likes of its nodes; one that has none is stood in for by the last node of its partition.

    Raises:
        CutError: Nothing of the cut is left.
    """

    def like(name: str) -> str | None:
        last = next((node for node in reversed(list(partition_of)) if partition_of[node] == first.get(name)), None)
        return found.get(name, last)

    nodes = tuple(name for name in map(like, cut.nodes) if name is not None)
    edges = tuple(
        Edge(found[edge.source], found[edge.target]) for edge in cut.edges if {edge.source, edge.target} <= set(found)
    )
    if not nodes and not edges:
        raise CutError(f"the cut {cut.name} has no place in this input kind")
    return replace(cut, nodes=nodes, edges=edges)
