"""Checkpoints and partitions: which regions are computed again in the backward pass where the model is cut."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from torch import fx

from dnifx.ir import Program
from dnifx.passes.cuts.partition import partitioned
from dnifx.passes.graph import INSERTED, captured, memory_read, memory_written
from dnifx.runtime.emitted.checkpoints import CHECKPOINT, Region, regions_of

Piece = list[fx.Node]
"""The nodes of a region in one partition."""


def settle_checkpoints(program: Program) -> list[str]:
    """Keep the checkpoints that can be kept, and return notes on the others; marks of the graph's nodes are changed in place.

    A region inside one partition is computed again as in the model. A region that is cut is computed again by each side, from
    what crosses to it, unless it would give other values then. An eligibility trace asks for many gradients of one window, and
    would compute a region again for each of them: there no checkpoint is kept.
    """
    mark_inserted(program)
    pieces: dict[Region, dict[int, Piece]] = {}
    for node in partitioned(captured(program)):
        for region in regions_of(node):
            pieces.setdefault(region, {}).setdefault(program.partition_of[node.name], []).append(node)
    notes = [settle(program, region, list(found.values())) for region, found in pieces.items()]
    return list(dict.fromkeys(note for note in notes if note))


def mark_inserted(program: Program) -> None:
    """Put reads of parameters, and what legalize has inserted, into the regions of the nodes that read them."""
    for node in reversed(captured(program).nodes):
        readers = {program.partition_of[user.name] for user in node.users}
        if (node.op == "get_attr" or INSERTED in node.meta) and readers == {program.partition_of[node.name]}:
            node.meta[CHECKPOINT] = regions_of(min(node.users))


def settle(program: Program, region: Region, pieces: Sequence[Piece]) -> str | None:
    """Keep a region whole, in pieces where it is cut, or not at all; return a note where it is not kept whole."""
    traced = any(cut.trace is not None for cut in program.recurrents)
    if traced or (len(pieces) > 1 and changes(program, region, list(chain.from_iterable(pieces)))):
        mark(pieces, region, ())
        reason = (
            "an eligibility trace would compute it again for each gradient"
            if traced
            else "it is cut, and computed again it would give other values"
        )
        return f"the checkpoint at {region.place} is not kept ({reason}): its activations stay in memory until the backward pass"
    last = max(pieces, key=max)
    mark((piece for piece in pieces if piece is not last), region, (replace(region, early_stop=False),))
    learning = [piece for piece in pieces if any(program.measures[node.name].requires_grad for node in piece)]
    return (
        f"the checkpoint at {region.place} is cut: each side is computed again by itself" if len(learning) > 1 else None
    )


def changes(program: Program, region: Region, nodes: Sequence[fx.Node]) -> bool:
    """Whether a region gives other values when it is computed again: it draws random numbers, or reads a buffer that it wrote."""
    held = {s for node in nodes if node.op == "get_attr" for s in program.measures[node.name].storages}
    written = held & {s for node in nodes for s in memory_written(program, node)}
    reads = any(written & memory_read(program, node) - memory_written(program, node) for node in nodes)
    return reads or (not region.preserve and any(program.measures[node.name].random for node in nodes))


def mark(pieces: Iterable[Piece], region: Region, instead: tuple[Region, ...]) -> None:
    """Replace a region by another one, or by none, on the nodes of some pieces."""
    for node in chain.from_iterable(pieces):
        around = regions_of(node)
        place = around.index(region)
        node.meta[CHECKPOINT] = (*around[:place], *instead, *around[place + 1 :])
