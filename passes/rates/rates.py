"""Rates: how often each partition of a system fires, from the names that the user gave."""

from collections.abc import Mapping

from torch import fx

from dnifx.errors import CutError, ScheduleError, nearest
from dnifx.ir import Every, Partition, Program, module_path
from dnifx.passes.graph import captured

Rates = Mapping[str, int | Every]


def rates_of(program: Program, every: Rates) -> tuple[Every, ...]:
    """Return how often each partition fires; one that is not named fires as often as the slowest of those it takes from.

    Args:
        program: A program with partitions.
        every: By module path or partition name.

    Raises:
        CutError: A name is not there, two names meet in one partition, or nothing fires at every window.
        ScheduleError: A partition does not fire once for a whole number of firings of one that it takes from.
    """
    named = named_rates(program, every)
    found: list[Every] = []
    for partition in program.partitions:
        sources = [found[index] for index in sources_of(partition, program)]
        slowest = max(sources, key=lambda rate: rate.windows, default=Every(1))
        found.append(named.get(partition.index, slowest))
    for partition in program.partitions:
        check_rate(partition, found, program, every)
    if min(rate.windows for rate in found) > 1:
        raise CutError(
            f"every={dict(every)!r}: nothing fires at every window, since {spelled(program.partitions[0], program, every)} does not; cut "
            "between what is fast and what is slow, and name the slow"
        )
    return tuple(found)


def named_rates(program: Program, every: Rates) -> dict[int, Every]:
    """Return the rates of the partitions that are named, or that hold a module that is."""
    found: dict[int, tuple[str, Every]] = {}
    for name, given in every.items():
        rate = given if isinstance(given, Every) else Every(given)
        if isinstance(rate.windows, bool) or not isinstance(rate.windows, int) or rate.windows < 1:
            raise CutError(f"every= says {given!r} for {name!r}; give a number of windows, 1 or more")
        for partition in partitions_named(program, name):
            other, before = found.setdefault(partition.index, (name, rate))
            if before != rate:
                raise CutError(
                    f"every= says {before.windows} for {other!r} and {rate.windows} for {name!r}, but both lie in "
                    f"{partition.name}; cut between them"
                )
    return {index: rate for index, (_, rate) in found.items()}


def partitions_named(program: Program, name: str) -> list[Partition]:
    """Return the partitions of a name: that partition, or those that compute inside a module of that path.

    Raises:
        CutError: There is none.
    """
    nodes = {node.name: node for node in captured(program).nodes}
    found = [each for each in program.partitions if each.name == name]
    found = found or [each for each in program.partitions if any(within(nodes[node], name) for node in each.nodes)]
    if not found:
        paths = dict.fromkeys(path for path, _ in program.model.named_modules() if path)
        known = [*paths, *(each.name for each in program.partitions)]
        raise CutError(f"{name!r} is no module or partition of this model; nearest: {nearest(name, known)}")
    return found


def within(node: fx.Node, path: str) -> bool:
    """Whether a node that computes lies inside a module."""
    return node.op.startswith("call") and f"{module_path(node)}.".startswith(f"{path}.")


def sources_of(partition: Partition, program: Program) -> list[int]:
    """Return the partitions that one takes values from; what is only returned is taken from nobody."""
    nodes = {node.name: node for node in captured(program).nodes}
    own = [nodes[name] for name in partition.nodes if nodes[name].op != "output"]
    sources = {program.partition_of.get(source.name) for node in own for source in node.all_input_nodes}
    return sorted(index for index in sources if index is not None and index != partition.index)


def check_rate(partition: Partition, rates: list[Every], program: Program, every: Rates) -> None:
    """Raise ScheduleError where a rate is no multiple of the rate of what a partition takes from."""
    own = rates[partition.index].windows
    for index in sources_of(partition, program):
        other = rates[index].windows
        if own % other:
            slow, fast = spelled(partition, program, every), spelled(program.partitions[index], program, every)
            raise ScheduleError(
                f"{slow} fires every {own} windows, but takes from {fast}, which fires every {other}: {other} does not divide {own}, so "
                f"no whole number of messages would be there; give {slow} a multiple of {other}"
            )


def spelled(partition: Partition, program: Program, every: Rates) -> str:
    """Name a partition, and what the user called it."""
    names = [name for name in every if partition in partitions_named(program, name) and name != partition.name]
    return f"{partition.name} ({', '.join(map(repr, names))})" if names else partition.name
