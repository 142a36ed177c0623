"""In-place writes and partitions: a value that crosses must be the same for all that read it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dnifx.errors import LegalizeError
from dnifx.ir import Program
from dnifx.passes.graph import INSERTED, computing, described, memory_outside, memory_written


@dataclass(frozen=True)
class Write:
    """A node that writes in place to memory that other partitions read.

    Attributes:
        node: The node.
        entering: Values of other partitions, in this memory, that the node's partition reads.
        early: Values of the node's partition that another partition reads before the write, with the reader.
        late: Readers in other partitions, after the write, of values of other partitions that were made before it.
    """

    node: fx.Node
    entering: tuple[fx.Node, ...]
    early: tuple[tuple[fx.Node, fx.Node], ...]
    late: tuple[fx.Node, ...]


def shield_writes(graph: fx.Graph, program: Program, partition_of: dict[str, int]) -> list[str]:
    """Clone what crosses before it is written in place, so that each partition writes to memory of its own.

    A partition that writes to a value of an earlier partition gets a clone of it. So does a reader in another partition
    that comes before the producer's own write.

    Args:
        graph: The graph, changed in place.
        program: The program, for its measures.
        partition_of: The partition of each node by name; clones are added.

    Returns:
        Notes on the clones.

    Raises:
        LegalizeError: A partition writes to memory that it shares with another one in a way that no clone keeps.
    """
    notes: list[str] = []
    for write in list(crossing_writes(graph, program, partition_of)):
        refuse_shared(write, partition_of)
        own = partition_of[write.node.name]
        for value in write.entering:
            readers = [user for user in value.users if partition_of[user.name] == own]
            add_clone(graph, value, readers, partition_of, at_reader=True)
            notes.append(f"submod_{own} takes a clone of {value.name}, since {write.node.name} writes to it in place")
        for value, reader in write.early:
            add_clone(graph, value, [reader], partition_of, at_reader=False)
            notes.append(
                f"{reader.name} reads a clone of {value.name}, since {write.node.name} writes to it afterwards"
            )
    return notes


def crossing_writes(graph: fx.Graph, program: Program, partition_of: dict[str, int]) -> Iterator[Write]:
    """Find the writes to memory that more than one partition reads.

    Memory of inputs, parameters and buffers is left out: the write has to reach it, and its readers keep their turns.
    """
    calls, outside = computing(graph), memory_outside(program)
    values: dict[int, list[fx.Node]] = {}
    for node in calls:
        for storage in program.measures[node.name].storages:
            values.setdefault(storage, []).append(node)
    for node in calls:
        own, written = partition_of[node.name], memory_written(program, node) - outside
        aliases = list(dict.fromkeys(alias for storage in written for alias in values.get(storage, ())))
        uses = [(alias, user) for alias in aliases for user in alias.users]
        entering = dict.fromkeys(a for a, u in uses if partition_of[a.name] != own and partition_of[u.name] == own)
        early = tuple((a, u) for a, u in uses if partition_of[a.name] == own != partition_of[u.name] and u < node)
        late = tuple(u for a, u in uses if own not in (partition_of[a.name], partition_of[u.name]) and a < node < u)
        if entering or early:
            yield Write(node, tuple(entering), early, late)


def refuse_shared(write: Write, partition_of: dict[str, int]) -> None:
    """Raise LegalizeError where a clone would hide a write from a partition that has to see it."""
    where = f"{described(write.node)} (submod_{partition_of[write.node.name]})"
    if len(write.entering) > 1:
        names = ", ".join(value.name for value in write.entering)
        raise LegalizeError(
            f"{where} writes in place to memory that crosses the cut as several values ({names}); make the write out of place, or "
            "cut so that they are made in the same partition"
        )
    if write.entering and write.late:
        reader = write.late[0]
        raise LegalizeError(
            f"{where} writes in place to {write.entering[0].name}, which {reader.name} in submod_{partition_of[reader.name]} reads "
            "afterwards; make the write out of place, or cut after it"
        )


def add_clone(
    graph: fx.Graph, value: fx.Node, readers: list[fx.Node], partition_of: dict[str, int], at_reader: bool
) -> None:
    """Insert a clone of a value for the given readers, in their partition or in the value's own."""
    place = graph.inserting_before(min(readers)) if at_reader else graph.inserting_after(value)
    with place:
        clone = graph.create_node("call_function", torch.clone, (value,), name=f"{value.name}_clone")
    clone.meta = {**value.meta, INSERTED: value.meta.get(INSERTED, value.name)}
    partition_of[clone.name] = partition_of[(readers[0] if at_reader else value).name]
    for reader in readers:
        reader.replace_input_with(value, clone)
