"""Place: which partition runs on which rank, and the sends and receives between ranks."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import inf
from typing import ClassVar

from torch import fx

from dnifx import schedules
from dnifx.engines.ranks import Traffic
from dnifx.errors import PlaceError, nearest
from dnifx.ir import Action, Program
from dnifx.passes.graph import captured
from dnifx.passes.pipeline import Pass
from dnifx.schedules.costs import measured_costs
from dnifx.schedules.dependencies import links

Places = str | Sequence[int] | Mapping[str, int]
"""What a user writes: ``"ranks"`` (balanced), or a rank for each partition, in order, by name, or as text (``"0,0,1"``)."""

Conflict = tuple[int, int, str]
"""Two partitions, the earlier first, that cannot run on different ranks, and why."""


@dataclass(frozen=True)
class PlacePartitions(Pass):
    """Give every action of the schedule its rank, and add the sends and receives between ranks.

    Attributes:
        places: ``"ranks"`` to balance the partitions by their measured cost, or ranks separated by commas.
        count: Number of ranks.
    """

    name: ClassVar[str] = "place"
    requires: ClassVar[tuple[str, ...]] = ("partitions", "schedule")
    ensures: ClassVar[tuple[str, ...]] = ("schedule",)

    places: str = "ranks"
    count: int = 2

    def run(self, program: Program) -> Program:
        """Return the program with its schedule over ranks.

        Raises:
            PlaceError: The partitions cannot run on these ranks.
            ScheduleError: The schedule names other ranks.
        """
        ranks = placed_ranks(self.places, program, self.count)
        plain = program.schedule or schedules.sequential(program)
        return replace(program, schedule=schedules.transferred(plain, program, ranks))


def placed_ranks(places: Places, program: Program, count: int) -> schedules.Ranks:
    """Return the rank of each partition.

    Args:
        places: What the user wrote.
        program: The program, with its interfaces.
        count: Number of ranks.

    Raises:
        PlaceError: A partition has no rank, a rank no partition, or partitions cannot run on different ranks.
    """
    refuse_everywhere(program)
    ranks = balanced(program, count) if places == "ranks" else by_hand(places, program)
    if set(ranks) != set(range(count)):
        raise PlaceError(
            f"{len(set(ranks))} of {count} ranks have partitions ({', '.join(map(str, ranks))}); give every rank one, or start as many "
            "processes as there are ranks"
        )
    for first, second, reason in conflicts(program):
        if ranks[first] != ranks[second]:
            names = program.partitions[first].name, program.partitions[second].name
            raise PlaceError(
                f"{reason}: {names[0]} and {names[1]} cannot run on ranks {ranks[first]} and {ranks[second]}. Give both one rank"
            )
    return ranks


def by_hand(places: Places, program: Program) -> schedules.Ranks:
    """Return the ranks that a user gave for each partition.

    Raises:
        PlaceError: They are not one for each partition.
    """
    names = [each.name for each in program.partitions]
    if isinstance(places, Mapping):
        wrong = sorted(set(places) ^ set(names))
        if wrong:
            raise PlaceError(
                f"places= names {nearest('', wrong, 3)} wrongly or not at all; give a rank for each of {nearest('', names, 9)}"
            )
        given: Sequence[object] = [places[name] for name in names]
    else:
        given = [read_rank(word) for word in places.split(",")] if isinstance(places, str) else list(places)
    if any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 0 for rank in given):
        raise PlaceError(
            f'places={places!r}: give "ranks", or the rank of each partition, such as [0, 0, 1], in processes that torchrun '
            "started; or, in one process, devices, such as ['cuda:0', 'cuda:1']"
        )
    if len(given) != len(names):
        raise PlaceError(
            f"{len(given)} ranks were given for {len(names)} partitions ({nearest('', names, 9)}); give one for each"
        )
    return tuple(rank for rank in given if isinstance(rank, int))


def read_rank(word: str) -> object:
    """Return a rank, or the word where it is none."""
    return int(word) if word.strip().isdecimal() else word


def balanced(
    program: Program,
    count: int,
    seconds: Mapping[Action, float] | None = None,
    apart: Iterable[Conflict] = (),
    word: str = "ranks",
) -> schedules.Ranks:
    """Return ranks for runs of neighbouring partitions, such that the costliest rank costs as little as possible.

    A partition costs what its actions and those of the boundaries that it produces do: estimators count. ``seconds`` are the costs of
    the actions, where they were measured; by default they are counted in FLOPs. Partitions that share parameters get one rank, as long
    as there are other places to divide at: ranks that share parameters send each other gradients and values in every step. ``apart``
    are further partitions that cannot be apart, and ``word`` says what the places are, in errors.

    Raises:
        PlaceError: There are fewer partitions than ranks, or too many that have to stay together.
    """
    wiring, costs = links(program), [0.0] * len(program.partitions)
    for action, cost in (measured_costs(program) if seconds is None else seconds).items():
        costs[wiring.place(action)] += cost
    together, sharing = [*conflicts(program), *apart], shared_parameters(program)
    starts = starts_outside(len(costs), [*together, *sharing])
    if count > len(starts) + 1:
        starts = starts_outside(len(costs), together)
    if count > len(starts) + 1:
        why = f". {together[0][2]}, so that partitions stay together" if together else ""
        raise PlaceError(
            f"{len(costs)} partitions give work for {len(starts) + 1} {word}, not for {count}{why}. Cut in more places, or "
            + ("start fewer processes" if word == "ranks" else f"give fewer {word}")
        )
    return divided(costs, [0, *starts, len(costs)], count)


def starts_outside(count: int, together: Sequence[Conflict]) -> list[int]:
    """Return where a rank's partitions may begin, such that none of these pairs is divided."""
    return [place for place in range(1, count) if not any(first < place <= second for first, second, _ in together)]


def divided(costs: Sequence[float], starts: Sequence[int], count: int) -> tuple[int, ...]:
    """Divide a row into ``count`` runs that begin at some of ``starts``; the largest sum is as small as possible.

    ``starts`` ends with the length of the row. Of several ways that are as good, the one whose runs begin earliest is taken.
    """
    if count == len(starts) - 1:  # there is one way, and in a deep net it is long to find
        return tuple(rank for rank, (start, end) in enumerate(pairwise(starts)) for _ in range(end - start))
    total = [0.0, *accumulate(costs)]
    ends = [total[place] for place in starts]
    best: list[tuple[float, tuple[int, ...]]] = [(0.0 if place == 0 else inf, ()) for place in range(len(starts))]
    for runs in range(count):
        best = [_last_run(best, ends, runs, end) for end in range(len(starts))]
    edges = [*(starts[place] for place in best[-1][1]), len(costs)]
    return tuple(rank for rank, (start, end) in enumerate(pairwise(edges)) for _ in range(end - start))


def _last_run(
    best: Sequence[tuple[float, tuple[int, ...]]], ends: Sequence[float], runs: int, end: int
) -> tuple[float, tuple[int, ...]]:
    """Return the best last run up to ``end``, behind ``runs`` others: the largest sum, and where all runs begin.

    The later it begins, the larger are the sums before it, and the smaller is its own: the best one is where they meet.
    """
    if end <= runs:
        return inf, ()
    possible = range(runs, end) if runs else range(1)
    meeting = bisect_left(possible, True, key=lambda place: best[place][0] >= ends[end] - ends[place])
    near = possible[max(meeting - 1, 0) : meeting + 1]
    least = min(max(best[place][0], ends[end] - ends[place]) for place in near)
    equal = [place for place in near if max(best[place][0], ends[end] - ends[place]) == least]
    while equal[0] > possible[0] and max(best[equal[0] - 1][0], ends[end] - ends[equal[0] - 1]) == least:
        equal.insert(0, equal[0] - 1)
    while equal[-1] < possible[-1] and max(best[equal[-1] + 1][0], ends[end] - ends[equal[-1] + 1]) == least:
        equal.append(equal[-1] + 1)
    return least, min((*best[place][1], place) for place in equal)


def traffic(program: Program, ranks: schedules.Ranks) -> dict[int, Traffic]:
    """Return, by rank, how many messages it receives in a step."""
    wiring = links(program)
    values: set[tuple[int, int]] = set()
    targets: set[tuple[int, int, int]] = set()
    gradients: set[tuple[int, int]] = set()
    weights: set[tuple[int, int]] = set()
    copies: set[tuple[int, int, int]] = set()
    for user, sources in enumerate(wiring.sources):
        values |= {(source, ranks[user]) for source in sources if ranks[source] != ranks[user]}
    for boundary, gate in enumerate(wiring.gates):
        own = ranks[gate.producer]
        targets |= {(boundary, own, ranks[user]) for user in gate.consumers if ranks[user] != own}
        copies |= {(boundary, own, ranks[owner]) for owner, _ in gate.copies if ranks[owner] != own}
    for owner, users in enumerate(wiring.users):
        gradients |= {(user, ranks[owner]) for user in users if ranks[user] != ranks[owner]}
        weights |= {(owner, ranks[user]) for user in users if ranks[user] != ranks[owner]}
    return {
        rank: Traffic(
            Counter(ranks[source] for source, taker in values if taker == rank),
            Counter(sender for _, taker, sender in targets if taker == rank),
            Counter(ranks[user] for user, taker in gradients if taker == rank),
            Counter(ranks[owner] for owner, taker in weights if taker == rank),
            Counter(sender for _, taker, sender in copies if taker == rank),
        )
        for rank in set(ranks)
    }


def refuse_everywhere(program: Program, over: str = "over ranks") -> None:
    """Raise PlaceError where a program cannot run on several ranks, or over several devices, whichever they are."""
    reason = ""
    if program.parts:
        reason = "the net has several rates (every=)"
    elif program.recurrents or program.carries:
        reason = "a state is cut in time, which one process carries from window to window"
    elif any(each.input_model is not None for each in program.interfaces):
        reason = "synthetic input models stand on boundaries"
    elif program.signature is not None and program.signature.left:
        reason = "forward leaves values on the model, which other places would not see"
    if reason:
        raise PlaceError(
            f"{reason}: this does not run {over}. Leave places= out, and train in one place; several processes can give replicas='average'"
        )


def conflicts(program: Program) -> Iterator[Conflict]:
    """Return the partitions that cannot run on different ranks."""
    last = len(program.partitions) - 1
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        if interface.needs_end:
            what = "output's error" if interface.needs_error else "loss"
            yield (
                boundary.producer,
                last,
                f"the estimator of {boundary.name!r} needs the {what}, which only the last rank knows",
            )
    yield from _read_by_suffixes(program)
    yield from _shared_buffers(program)


def shared_parameters(program: Program) -> list[Conflict]:
    """Return the partitions that share parameters. They can run on different ranks, which then send each other gradients and values."""
    found = []
    for owner in program.partitions:
        for user in program.partitions:
            shared = sorted(set(user.uses) & set(owner.parameters)) if user is not owner else []
            if shared:
                first, second = sorted((owner.index, user.index))
                found.append((first, second, f"they share the parameter {shared[0]!r}"))
    return found


def _read_by_suffixes(program: Program) -> Iterator[Conflict]:
    """Partitions whose values a suffix reads, and the one that asks it: nothing brings these to another rank."""
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        taken = program.partitions[boundary.producer].inputs
        homes = ((program.partition_of.get(name), name) for name in interface.reads if name not in taken)
        for other, name in {home: name for home, name in homes if home is not None}.items():
            if other != boundary.producer:
                first, second = sorted((boundary.producer, other))
                yield first, second, f"the suffix on {boundary.name!r} reads {name!r}"


def copied_by_suffixes(program: Program) -> Iterator[Conflict]:
    """Partitions whose weights a suffix copies, and the one that asks it: in one process nothing brings these to another place."""
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        for name in interface.mirrors:
            users = [each.index for each in program.partitions if name in each.uses]
            other = min(users, key=lambda user: abs(user - boundary.producer), default=boundary.producer)
            if other != boundary.producer:
                first, second = sorted((boundary.producer, other))
                what = f"copies {name!r} (readout='own' and decay=None copy nothing)"
                yield first, second, f"the suffix on {boundary.name!r} {what}"


def _shared_buffers(program: Program) -> Iterator[Conflict]:
    """Partitions that read a buffer which one of them may write, such as the statistics of a module that both call."""
    readers: dict[str, set[int]] = {}
    written: set[str] = set()
    nodes = captured(program).nodes if program.graph is not None else ()
    changed = {name for measure in program.measures.values() for name in measure.writes}
    for node in nodes:
        for name, writes in _buffers(node, program):
            readers.setdefault(name, set()).add(program.partition_of.get(node.name, 0))
            for user in node.users if node.op == "get_attr" else ():
                readers[name].add(program.partition_of.get(user.name, 0))
            if writes or node.name in changed:
                written.add(name)
    for name in sorted(written):
        homes = sorted(readers[name])
        for second in homes[1:]:
            yield homes[0], second, f"they share the buffer {name!r}, which a forward pass may change"


def _buffers(node: fx.Node, program: Program) -> Iterator[tuple[str, bool]]:
    """The buffers that a node reads, and whether it may write them."""
    buffers = dict(program.model.named_buffers(remove_duplicate=False))
    if node.op == "get_attr" and str(node.target) in buffers:
        yield str(node.target), False
    if node.op == "call_module":
        inside = f"{node.target}."
        yield from ((name, True) for name in buffers if name.startswith(inside))
