"""Cuts given as a number: k partitions, balanced by measured cost, at the cheapest places.

Every prefix of a topological order is convex, so a choice of k - 1 prefixes is a choice of k partitions. Where a single
value separates the graph, every topological order has that prefix, so no order hides such a cut.

A choice is made among the places that ``places.py`` finds. First comes the least possible cost of the costliest partition.
Then, among the choices whose costliest partition is within ``slack`` of it, dynamic programming finds the lowest sum of the
places' prices. What costs more than its share between two places counts as its share, so that one costly layer does not
leave the rest unbalanced. Places that divide repeated blocks are left out, unless that doubles the costliest partition.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import fx

from dnifx.errors import CutError
from dnifx.ir import Cut, Program, module_path
from dnifx.passes.cuts.places import Barrier, Place, barred, find_places
from dnifx.passes.graph import captured, computing, listed
from dnifx.passes.measure import differentiable


def balanced_cuts(program: Program, parts: int, slack: float) -> tuple[Cut, ...]:
    """Return parts - 1 cuts after prefixes of the execution order.

    Raises:
        CutError: The model cannot be cut into that many partitions.
    """
    if parts < 2:
        raise CutError(f"cuts={parts} asks for {parts} partition(s); give 2 or more, or name modules")
    nodes = computing(captured(program))
    found, barriers = find_places(program, nodes, parts - 1)
    if len(found) < parts - 1:
        raise CutError(too_few(program, parts, len(found), barriers))
    costs = list(accumulate(program.measures[node.name].cost for node in nodes))
    ends = capped([*(costs[place.position] for place in found), costs[-1]], parts)
    chosen = undivided(found, ends, parts)
    places, ends = [found[index] for index in chosen], [*(ends[index] for index in chosen), ends[-1]]
    limit = least_bottleneck(ends[:-1], ends[-1], parts) * (1 + slack)
    cheap = cheapest(ends, [place.price for place in places], parts, limit)
    return named_cuts(program, nodes, [places[index].position for index in cheap])


def too_few(program: Program, parts: int, count: int, barriers: Sequence[Barrier]) -> str:
    """Return the error text for a model with fewer places than cuts: what stands in the way, then what to do."""
    kept = [each for each in (program.capture.kept if program.capture else ()) if each.path]
    whole = [f"{each.path!r} is kept whole, as one node: {' '.join(each.reason.split())}" for each in kept]
    reasons = [reason for reason in (listed(whole, separator="; "), barred(barriers)) if reason]
    remedies = [f"ask for {count + 1} partitions or fewer"] if count else []
    remedies += ["change what is named here"] if reasons else []
    needs = "each partition needs a layer to train, and a gradient has to cross each cut"
    return (
        f"cuts={parts} asks for {parts} partitions, but {type(program.model).__name__} can be cut at {count or 'no'} "
        f"place{'' if count == 1 else 's'}: {'; '.join([needs, *reasons])}\n"
        f"{', or '.join([*remedies, 'name modules, nodes or edges as cuts'])}"
    )


def capped(ends: Sequence[int], parts: int) -> list[int]:
    """Return the summed costs up to each end, where what costs more than its share between two ends counts as its share."""
    units = [stop - start for start, stop in pairwise([0, *ends])]
    rest, count = sum(units), parts
    for unit in sorted(units, reverse=True):
        if unit * count <= rest:
            break
        rest, count = rest - unit, count - 1
    share = -(-rest // count)
    return list(accumulate(min(unit, share) for unit in units))


def undivided(places: Sequence[Place], ends: Sequence[int], parts: int) -> list[int]:
    """Return which places to choose among: those that divide the fewest repeated blocks and still balance."""
    least = least_bottleneck(ends[:-1], ends[-1], parts)
    for most in sorted({place.divided for place in places}):
        chosen = [index for index, place in enumerate(places) if place.divided <= most]
        if (
            len(chosen) >= parts - 1
            and least_bottleneck([ends[index] for index in chosen], ends[-1], parts) <= 2 * least
        ):
            return chosen
    return list(range(len(places)))


def least_bottleneck(ends: Sequence[int], total: int, parts: int) -> int:
    """Return the least possible cost of the costliest of ``parts`` partitions, by bisection over that cost."""
    costs = range(-(-total // parts), total)
    return costs.start + bisect_left(costs, True, key=lambda limit: parts_needed(ends, total, limit) <= parts)


def parts_needed(ends: Sequence[int], total: int, limit: int) -> int:
    """Return the fewest partitions that keep each within the limit, by making each as large as possible."""
    count, start = 1, 0
    while total - start > limit:
        furthest = bisect_right(ends, start + limit) - 1
        if furthest < 0 or ends[furthest] <= start:
            return total + 1
        count, start = count + 1, ends[furthest]
    return count


def cheapest(ends: list[int], prices: list[int], parts: int, limit: float) -> list[int]:
    """Return the indices of the parts - 1 prefixes with the lowest sum of prices, no partition costlier than the limit.

    ``best[i]`` is the least sum of prices of j prefixes that end at i. A sliding window over the prefixes that the limit
    allows before i makes the work for each j linear.
    """
    count = len(ends)
    infinite = float("inf")
    best: list[float] = [prices[i] if i < count - 1 and ends[i] <= limit else infinite for i in range(count)]
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
                own = prices[index] if index < count - 1 else 0
                following[index], before[index] = best[window[0]] + own, window[0]
        best = following
        previous.append(before)
    chosen, index = [], count - 1
    for before in reversed(previous):
        index = before[index]
        chosen.append(index)
    return chosen[::-1]


def named_cuts(program: Program, nodes: list[fx.Node], positions: list[int]) -> tuple[Cut, ...]:
    """Name each prefix after the largest value with a gradient that crosses its end."""
    order, live = {node: index for index, node in enumerate(nodes)}, differentiable(program)
    cuts: list[Cut] = []
    for level, position in enumerate(positions):
        start = positions[level - 1] + 1 if level else 0
        crossing = [
            node
            for node in nodes[start : position + 1]
            if node in live and any(order.get(user, position + 1) > position for user in node.users)
        ]
        largest = max(
            crossing, key=lambda node: (program.measures[node.name].bytes, order[node]), default=nodes[position]
        )
        name = module_path(largest) or largest.name
        taken = {cut.name for cut in cuts}
        cuts.append(Cut(name if name not in taken else largest.name, (nodes[position].name,), level=level))
    return tuple(cuts)
