"""Cuts given as a number: k partitions, balanced by measured cost, with the fewest bytes across.

Every prefix of a topological order is convex, so a choice of k - 1 prefixes is a choice of k partitions. Among all such
choices in the order of execution the result is exact. First comes the least possible cost of the costliest partition.
Then, among the choices whose costliest partition is within ``slack`` of it, dynamic programming finds the fewest bytes that
cross. Where a single value separates the graph, every topological order has that prefix, so no order hides such a cut.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from itertools import accumulate

import networkx as nx
from torch import fx

from dnifx.errors import CutError
from dnifx.ir import Cut, Program
from dnifx.passes.graph import captured, memory_written, module_path


def balanced_cuts(program: Program, parts: int, slack: float) -> tuple[Cut, ...]:
    """Return parts - 1 cuts after prefixes of the execution order.

    Raises:
        CutError: The model cannot be cut into that many partitions.
    """
    if parts < 2:
        raise CutError(f"cuts={parts} asks for {parts} partition(s); give 2 or more, or name modules")
    nodes = execution_order(captured(program))
    costs = list(accumulate(program.measures[node.name].cost for node in nodes))
    allowed, crossing = prefixes(program, nodes)
    if len(allowed) < parts - 1:
        raise CutError(
            f"cuts={parts} asks for {parts} partitions, but {type(program.model).__name__} can be cut at {len(allowed)} "
            f"places only; ask for {len(allowed) + 1} or fewer"
        )
    ends = [costs[position] for position in allowed]
    limit = least_bottleneck(ends, costs[-1], parts) * (1 + slack)
    chosen = cheapest([*ends, costs[-1]], [crossing[position] for position in allowed], parts, limit)
    return named_cuts(program, nodes, [allowed[index] for index in chosen])


def execution_order(graph: fx.Graph) -> list[fx.Node]:
    """Return the computing nodes in a topological order, checked against the graph's edges."""
    nodes = [node for node in graph.nodes if node.op.startswith("call")]
    order = {node: index for index, node in enumerate(nodes)}
    edges = nx.DiGraph()
    edges.add_nodes_from(nodes)
    edges.add_edges_from((node, user) for node in nodes for user in node.users if user in order)
    return list(nx.lexicographical_topological_sort(edges, key=order.__getitem__))


def prefixes(program: Program, nodes: list[fx.Node]) -> tuple[list[int], list[int]]:
    """Return the positions after which a cut is possible, and the bytes that cross after each position.

    A cut is possible where a value with a gradient crosses, unless a later node writes in place to memory of an earlier one
    or takes apart a container that an earlier one made.
    """
    count = len(nodes)
    order = {node: index for index, node in enumerate(nodes)}
    crossing, flowing, blocked = [0] * (count + 1), [0] * (count + 1), [0] * (count + 1)
    made: dict[int, int] = {}
    for index, node in enumerate(nodes):
        measure = program.measures[node.name]
        last = max((order.get(user, count - 1 if user.op == "output" else index) for user in node.users), default=index)
        computing = max((order[user] for user in node.users if user in order), default=index)
        spread(crossing, index, last, measure.bytes)
        spread(flowing, index, computing, int(measure.requires_grad))
        if measure.tensors and not measure.is_tensor:
            spread(blocked, index, computing, 1)
        for storage in memory_written(program, node):
            spread(blocked, made.get(storage, index), index, 1)
        for storage in measure.storages:
            made.setdefault(storage, index)
    crossing, flowing, blocked = (list(accumulate(line)) for line in (crossing, flowing, blocked))
    return [index for index in range(count - 1) if flowing[index] and not blocked[index]], crossing


def spread(line: list[int], start: int, stop: int, amount: int) -> None:
    """Add an amount to the positions from start up to stop; the line holds differences between neighbours."""
    line[start] += amount
    line[stop] -= amount


def least_bottleneck(ends: list[int], total: int, parts: int) -> int:
    """Return the least possible cost of the costliest of ``parts`` partitions, by bisection over that cost."""
    costs = range(-(-total // parts), total)
    return costs.start + bisect_left(costs, True, key=lambda limit: parts_needed(ends, total, limit) <= parts)


def parts_needed(ends: list[int], total: int, limit: int) -> int:
    """Return the fewest partitions that keep each within the limit, by making each as large as possible."""
    count, start = 1, 0
    while total - start > limit:
        furthest = bisect_right(ends, start + limit) - 1
        if furthest < 0 or ends[furthest] <= start:
            return total + 1
        count, start = count + 1, ends[furthest]
    return count


def cheapest(ends: list[int], crossing: list[int], parts: int, limit: float) -> list[int]:
    """Return the indices of the parts - 1 prefixes with the fewest bytes across, no partition costlier than the limit.

    ``best[i]`` is the least sum of bytes of j prefixes that end at i. A sliding window over the prefixes that the limit
    allows before i makes the work for each j linear.
    """
    count = len(ends)
    infinite = float("inf")
    best: list[float] = [crossing[i] if i < count - 1 and ends[i] <= limit else infinite for i in range(count)]
    previous: list[list[int]] = []
    for _ in range(parts - 1):
        following, before = [infinite] * count, [-1] * count
        window: deque[int] = deque()
        for index in range(1, count):
            while window and best[window[-1]] >= best[index - 1]:
                window.pop()
            window.append(index - 1)
            first = bisect_left(ends, ends[index] - limit)
            while window and window[0] < first:
                window.popleft()
            if window and best[window[0]] < infinite:
                own = crossing[index] if index < count - 1 else 0
                following[index], before[index] = best[window[0]] + own, window[0]
        best = following
        previous.append(before)
    chosen, index = [], count - 1
    for before in reversed(previous):
        index = before[index]
        chosen.append(index)
    return chosen[::-1]


def named_cuts(program: Program, nodes: list[fx.Node], positions: list[int]) -> tuple[Cut, ...]:
    """Name each prefix after the largest value that crosses its end."""
    order = {node: index for index, node in enumerate(nodes)}
    cuts: list[Cut] = []
    for level, position in enumerate(positions):
        start = positions[level - 1] + 1 if level else 0
        crossing = [
            node
            for node in nodes[start : position + 1]
            if program.measures[node.name].requires_grad
            and any(order.get(user, position + 1) > position for user in node.users)
        ]
        largest = max(
            crossing, key=lambda node: (program.measures[node.name].bytes, order[node]), default=nodes[position]
        )
        name = module_path(largest) or largest.name
        taken = {cut.name for cut in cuts}
        cuts.append(Cut(name if name not in taken else largest.name, (nodes[position].name,), level=level))
    return tuple(cuts)
