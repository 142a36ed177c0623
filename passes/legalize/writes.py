"""In-place writes and partitions: a value that crosses must be the same for everybody who reads it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dnifx.errors import LegalizeError
from dnifx.ir import Program
from dnifx.passes.graph import INSERTED, module_path


@dataclass(frozen=True)
class Write:
    """A node that writes in place to memory that other partitions see."""

    node: fx.Node
    entering: tuple[fx.Node, ...]
    early: tuple[tuple[fx.Node, fx.Node], ...]
    late: tuple[fx.Node, ...]


def shield_writes(graph: fx.Graph, program: Program, partition_of: dict[str, int]) -> list[str]:
    """Clone what crosses before it is written in place, so that each partition writes to memory of its own.

    A partition that writes to a value which came from an earlier one works on a clone; a reader in another partition that
    precedes the producer's own write gets a clone.

    Args:
        graph: The graph, changed in place.
        program: The program, for its measures.
        partition_of: The partition of each node by name; clones are added.

    Returns:
        Notes on what was mended.

    Raises:
        LegalizeError: A partition writes to memory that it shares with another one in a way that no clone keeps.
    """
    notes: list[str] = []
    for write in list(crossing_writes(graph, program, partition_of)):
        refuse_shared(write, partition_of)
        for value in write.entering:
            add_clone(
                graph,
                value,
                [u for u in value.users if partition_of[u.name] == partition_of[write.node.name]],
                partition_of,
                True,
            )
            notes.append(
                f"{value.name} is cloned where submod_{partition_of[write.node.name]} takes it: {write.node.name} writes to it in place"
            )
        for value, reader in write.early:
            add_clone(graph, value, [reader], partition_of, False)
            notes.append(
                f"{reader.name} reads a clone of {value.name}: {write.node.name} writes to it in place afterwards"
            )
    return notes


def crossing_writes(graph: fx.Graph, program: Program, partition_of: dict[str, int]) -> Iterator[Write]:
    """Find the writes to memory that more than one partition sees."""
    values: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op.startswith("call"):
            for storage in program.measures[node.name].storages:
                values.setdefault(storage, []).append(node)
    for node in graph.nodes:
        if not node.op.startswith("call") or not program.measures[node.name].writes:
            continue
        home = partition_of[node.name]
        written = {
            storage for name in program.measures[node.name].writes for storage in program.measures[name].storages
        }
        aliases = list(dict.fromkeys(alias for storage in written for alias in values.get(storage, ())))
        uses = [(alias, user) for alias in aliases for user in alias.users]
        entering = dict.fromkeys(a for a, u in uses if partition_of[a.name] != home and partition_of[u.name] == home)
        early = tuple((a, u) for a, u in uses if partition_of[a.name] == home != partition_of[u.name] and u < node)
        late = tuple(u for a, u in uses if partition_of[u.name] != home and partition_of[a.name] != home and node < u)
        if entering or early:
            yield Write(node, tuple(entering), early, late)


def refuse_shared(write: Write, partition_of: dict[str, int]) -> None:
    """Raise LegalizeError where a clone would hide a write from somebody who has to see it."""
    where = (
        f"{write.node.name} in module {module_path(write.node) or '<root>'!r} (submod_{partition_of[write.node.name]})"
    )
    if len(write.entering) > 1:
        names = ", ".join(value.name for value in write.entering)
        raise LegalizeError(
            f"{where} writes in place to memory that crosses the cut as several values ({names}); make it out of place "
            "there, or cut so that they are made in the same partition"
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
