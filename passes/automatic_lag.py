"""``lag="auto"``: the steps that targets may be late, so that no rank waits for the links between them."""

import copy
import time
from math import ceil

import torch

from dnifx.engines.joining import join_ranks
from dnifx.engines.round_trip import largest, round_trip
from dnifx.ir import Kind, Program
from dnifx.schedules import Ranks, sequential, transferred
from dnifx.schedules.clock import moved_bytes, value_bytes
from dnifx.schedules.costs import measured_costs
from dnifx.schedules.dependencies import links

MOST = 64
"""The largest lag that is chosen: of older targets an estimator learns little, and each step that waits takes memory."""

SPARE = 1.25
"""By how much the way there and back may last longer than it did."""

RUNS = 2
"""Forward passes that are timed, after one that allocates memory."""


def automatic_lag(program: Program, ranks: Ranks) -> int:
    """Choose a lag from the longest way there and back between ranks, and the step of the slowest rank.

    Every rank has to call it, before the first step, and all choose the same. Nothing changes by it: what is timed is a forward pass of
    a copy of the model. A step of a rank takes as many times longer as its actions have more FLOPs.
    """
    trip, step = round_trip(messages_of(program, ranks)), largest(step_seconds(program, ranks, join_ranks()[0]))
    return enough(trip, step)


def messages_of(program: Program, ranks: Ranks) -> dict[tuple[int, int], int]:
    """Return the bytes of the largest message from rank to rank in a step: values of a boundary, or of tied parameters."""
    found: dict[tuple[int, int], int] = {}
    for boundary in program.boundaries:
        size, sender = sum(spec.bytes for spec in boundary.specs), ranks[boundary.producer]
        for taker in {ranks[consumer] for consumer in boundary.consumers} - {sender}:
            found[sender, taker] = max(size, found.get((sender, taker), 0))
    sizes = value_bytes(program)
    for action in transferred(sequential(program), program, ranks).actions:
        if (
            action.rank is not None
            and action.peer is not None
            and action.kind in (Kind.SEND_GRADIENTS, Kind.SEND_WEIGHTS)
        ):
            way = action.rank, action.peer
            found[way] = max(moved_bytes(action, program, sizes, ranks), found.get(way, 0))
    return found


def enough(trip: float, step: float) -> int:
    """Return the smallest lag for a way there and back and a step, both in seconds: one, and the steps that pass meanwhile."""
    return min(MOST, 1 + ceil(SPARE * trip / step)) if step else MOST


def step_seconds(program: Program, ranks: Ranks, rank: int) -> float:
    """Estimate how long a rank's part of a step takes here."""
    wiring, costs = links(program), measured_costs(program)
    own = sum(cost for action, cost in costs.items() if ranks[wiring.place(action)] == rank)
    forward = sum(cost for action, cost in costs.items() if action.kind == "F")
    return forward_seconds(program) * own / forward if forward else 0.0


def forward_seconds(program: Program) -> float:
    """Time a forward pass of a copy of the model on the example inputs; the fastest counts."""
    model, times = copy.deepcopy(program.model), []
    args, kwargs = copy.deepcopy((program.args, dict(program.kwargs)))
    with torch.random.fork_rng(), torch.no_grad():
        for _ in range(1 + RUNS):
            started = time.perf_counter()
            model(*args, **kwargs)
            times.append(time.perf_counter() - started)
    return min(times[1:])
