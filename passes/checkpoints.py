"""Checkpoints and partitions: which regions are computed again in the backward pass where the model is cut."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from torch import fx

from dnifx.ir import Program
from dnifx.passes.capture import captured
from dnifx.passes.partition import homed
from dnifx.passes.writes import INSERTED
from dnifx.runtime.checkpoints import CHECKPOINT, Region, regions_of

Piece = list[fx.Node]
"""The nodes of a region that one partition runs."""


def settle_checkpoints(program: Program) -> list[str]:
    """Keep the checkpoints that can be kept, and return notes on the others; marks of the graph's nodes are changed in place.

    A region inside one partition is computed again as in the model. Where it is cut, each side is computed again by itself, from
    what crosses to it. An eligibility trace asks for many gradients of one window, each of which would compute it again.
    """
    follow_readers(program)
    pieces: dict[Region, dict[int, Piece]] = {}
    for node in homed(captured(program)):
        for region in regions_of(node):
            pieces.setdefault(region, {}).setdefault(program.homes[node.name], []).append(node)
    notes = [settle(program, region, list(found.values())) for region, found in pieces.items()]
    return list(dict.fromkeys(note for note in notes if note))


def follow_readers(program: Program) -> None:
    """Let reads of parameters, and what legalize has put in, lie in the regions of those that read them."""
    for node in reversed(captured(program).nodes):
        homes = {program.homes[user.name] for user in node.users}
        if (node.op == "get_attr" or INSERTED in node.meta) and homes == {program.homes[node.name]}:
            node.meta[CHECKPOINT] = regions_of(min(node.users))


def settle(program: Program, region: Region, pieces: Sequence[Piece]) -> str | None:
    """Keep one region, in pieces where it is cut, or drop it; return a note where it is not kept whole."""
    if any(cut.trace is not None for cut in program.recurrents):
        mark(pieces, region, ())
        return f"the checkpoint at {region.place} is not kept: for the trace its activations stay in memory until the backward pass"
    last = max(pieces, key=max)
    mark((piece for piece in pieces if piece is not last), region, (replace(region, early_stop=False),))
    learning = [piece for piece in pieces if any(program.measures[node.name].requires_grad for node in piece)]
    return (
        f"the checkpoint at {region.place} is cut: each side is computed again by itself" if len(learning) > 1 else None
    )


def mark(pieces: Iterable[Piece], region: Region, instead: tuple[Region, ...]) -> None:
    """Put another region in the place of one, or none."""
    for node in chain.from_iterable(pieces):
        around = regions_of(node)
        place = around.index(region)
        node.meta[CHECKPOINT] = (*around[:place], *instead, *around[place + 1 :])
