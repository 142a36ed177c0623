"""Checkpoints and partitions: which regions are computed again in the backward pass where the model is cut."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from torch import fx

from dnifx.ir import Program
from dnifx.passes.cuts.partition import partitioned
from dnifx.passes.graph import INSERTED, captured
from dnifx.runtime.emitted.checkpoints import CHECKPOINT, Region, regions_of

Piece = list[fx.Node]
"""The nodes of a region that one partition runs."""


def settle_checkpoints(program: Program) -> list[str]:
    """Keep the checkpoints that can be kept, and return notes on the others; marks of the graph's nodes are changed in place.

    A region inside one partition is computed again as in the model. Where it is cut, each side is computed again by itself, from
    what crosses to it, unless it would give something else then. An eligibility trace asks for many gradients of one window, each of
    which would compute it again.
    """
    follow_readers(program)
    pieces: dict[Region, dict[int, Piece]] = {}
    for node in partitioned(captured(program)):
        for region in regions_of(node):
            pieces.setdefault(region, {}).setdefault(program.partition_of[node.name], []).append(node)
    notes = [settle(program, region, list(found.values())) for region, found in pieces.items()]
    return list(dict.fromkeys(note for note in notes if note))


def follow_readers(program: Program) -> None:
    """Let reads of parameters, and what legalize has put in, lie in the regions of those that read them."""
    for node in reversed(captured(program).nodes):
        partition_of = {program.partition_of[user.name] for user in node.users}
        if (node.op == "get_attr" or INSERTED in node.meta) and partition_of == {program.partition_of[node.name]}:
            node.meta[CHECKPOINT] = regions_of(min(node.users))


def settle(program: Program, region: Region, pieces: Sequence[Piece]) -> str | None:
    """Keep one region, in pieces where it is cut, or drop it; return a note where it is not kept whole."""
    traced = any(cut.trace is not None for cut in program.recurrents)
    if traced or (len(pieces) > 1 and changes(program, region, list(chain.from_iterable(pieces)))):
        mark(pieces, region, ())
        reason = "for an eligibility trace" if traced else "computed again it gives something else, and it is cut"
        return f"the checkpoint at {region.place} is not kept ({reason}): its activations stay in memory until the backward pass"
    last = max(pieces, key=max)
    mark((piece for piece in pieces if piece is not last), region, (replace(region, early_stop=False),))
    learning = [piece for piece in pieces if any(program.measures[node.name].requires_grad for node in piece)]
    return (
        f"the checkpoint at {region.place} is cut: each side is computed again by itself" if len(learning) > 1 else None
    )


def changes(program: Program, region: Region, nodes: Sequence[fx.Node]) -> bool:
    """Whether a region that is computed again gives something else: other random numbers, or what it has made of a buffer."""
    measures = program.measures
    held = {s for node in nodes if node.op == "get_attr" for s in measures[node.name].storages}
    writers = {node: {s for name in measures[node.name].writes for s in measures[name].storages} for node in nodes}
    written = held & set(chain.from_iterable(writers.values()))
    seen = {node: {s for source in node.all_input_nodes for s in measures[source.name].storages} for node in nodes}
    reads = any(written & seen[node] - writers[node] for node in nodes)
    return reads or (not region.preserve and any(measures[node.name].random for node in nodes))


def mark(pieces: Iterable[Piece], region: Region, instead: tuple[Region, ...]) -> None:
    """Put another region in the place of one, or none."""
    for node in chain.from_iterable(pieces):
        around = regions_of(node)
        place = around.index(region)
        node.meta[CHECKPOINT] = (*around[:place], *instead, *around[place + 1 :])
