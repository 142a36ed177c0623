"""The rate of a net over places, from measured costs and a link."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, inf

from dnifx import schedules
from dnifx.doctor.profiling import Profile
from dnifx.ir import SENDS, Action, Kind, Program
from dnifx.schedules import Link, Ranks, Simulation
from dnifx.schedules.clock import moved_bytes, value_bytes
from dnifx.schedules.dependencies import links

ENOUGH = 0.98
"""A lag is enough where the rate is at least so much of the rate with a longer one."""

MEASURED = 6
"""Steps over which a rate is taken, at least."""


@dataclass(frozen=True)
class Prediction:
    """How fast a net would train over places.

    Attributes:
        lag: Steps that targets are late.
        rate: Steps per second, the whole batch each.
        work: Seconds for which all places together are busy in a step.
        peaks: Bytes of activations that each place holds at most.
    """

    lag: int
    rate: float
    work: float
    peaks: tuple[int, ...]


def predict(
    program: Program,
    profile: Profile,
    ranks: Ranks,
    link: Link | None = None,
    lag: int | None = None,
    cores: float = inf,
) -> Prediction:
    """Predict the rate of a net over places.

    A place is busy with its own actions, with what a step does beside them, and with its messages. It waits for messages. Where places
    share cores, they cannot do more work in a second than the cores do.

    Args:
        program: A program with interfaces.
        profile: Measured costs of its actions.
        ranks: The rank of each partition.
        link: The link between any two ranks.
        lag: Steps that targets are late; the smallest under which nothing waits for them by default.
        cores: How many cores the places share; by default each place has one of its own.
    """
    line, costs = link or Link(), spread(profile, program, ranks)
    found = cache(lambda late: simulated(program, costs, ranks, line, late))
    if lag is None:
        longest = longest_wait(program, costs, ranks, line)
        lag = bisect_left(range(longest), True, key=lambda late: found(late).rate >= ENOUGH * found(longest).rate)
    simulation = found(lag)
    work = sum(span.end - span.start for span in simulation.spans if span.step == 1)
    peaks = tuple(simulation.peak_bytes[f"rank{rank}"] for rank in sorted(set(ranks)))
    return Prediction(lag, min(simulation.rate, cores / work), work, peaks)


def spread(profile: Profile, program: Program, ranks: Ranks) -> dict[str, float]:
    """Return the costs of all actions; the first forward of each rank also takes what a step does beside its actions."""
    first = {rank: index for index, rank in reversed([*enumerate(ranks)])}
    beside = {str(Action(Kind.FORWARD, index)): profile.beside for index in first.values()}
    return {name: cost + beside.get(name, 0.0) for name, cost in profile.costs.items()}


def simulated(program: Program, costs: Mapping[str, float], ranks: Ranks, link: Link, lag: int) -> Simulation:
    """Simulate as many steps as a steady rate needs: the first targets come after ``lag`` steps, and then in groups of as many."""
    plain = schedules.sequential(program)
    placed = schedules.transferred(schedules.lagged(plain, program, lag), program, ranks)
    group = max(lag, 1)
    return schedules.simulate(placed, program, costs, 2 * group * ceil(MEASURED / group) + 1, link)


def longest_wait(program: Program, costs: Mapping[str, float], ranks: Ranks, link: Link) -> int:
    """Return a lag under which nothing waits: the steps of the slowest rank in the way there and back of the largest message."""
    wiring, busy, sizes = links(program), dict.fromkeys(ranks, 0.0), value_bytes(program)
    for name, cost in costs.items():
        busy[ranks[wiring.place(schedules.parse(name).actions[0])]] += cost
    sent, largest = dict.fromkeys(ranks, 0), 0
    for action in schedules.transferred(schedules.sequential(program), program, ranks).actions:
        if action.kind in SENDS and action.rank is not None:
            size = moved_bytes(action, program, sizes, ranks)
            sent[action.rank] += size
            largest = max(largest, size)
    way = link.latency + largest * (1 / link.bandwidth + 2 * link.handling)
    slowest = max(*busy.values(), max(sent.values()) / link.bandwidth)
    return ceil(2 * way / slowest) + 3 if slowest else 3
