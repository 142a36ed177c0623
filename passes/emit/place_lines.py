"""A training step over several places of one process: the blocks of all places, in one function.

Each place has the blocks that a rank would have (``transfer_lines.py``), in the order of the schedule. What a place takes of the
batch and of other places has a name of its own there.
"""

import ast
from collections.abc import Collection, Sequence

from dnifx.ir import SENDS, Action
from dnifx.passes.emit.blocks import Block, StepPlan, local, named
from dnifx.passes.graph import input_names


def placed_blocks(plan: StepPlan, blocks: Sequence[tuple[Action, Block]]) -> list[Block]:
    """Return what every place takes of the batch, and the blocks of a step under the names of their places.

    Args:
        plan: What the step is written from.
        blocks: The blocks of the schedule's actions, whose ranks are the numbers of their places.
    """
    batch = {*map(local, input_names(plan.program)), "target", "features"}
    read = {action.rank or 0: set[str]() for action, _ in blocks}
    for action, block in blocks:
        read[action.rank or 0] |= free_names(ast.parse("\n".join(block.lines)))
    found = [taken(plan, place, sorted(names & batch)) for place, names in sorted(read.items()) if names & batch]
    here = -1
    for action, block in blocks:
        place = action.rank or 0
        own = batch | {local(name) for source in plan.program.partitions for name in plan.arriving(source.index, place)}
        lines = renamed(block.lines, own, place)
        entered = () if place == here else (enter(plan, place),)
        found.append(Block(titled(plan, action, block.title), (*entered, *lines)))
        here = place
    return found


def taken(plan: StepPlan, place: int, names: Sequence[str]) -> Block:
    """Let a place take what it needs of the batch."""
    made = ", ".join(at(name, place) for name in names)
    line = f"{made}, = {plan.carrier}.taken({', '.join(names)})"
    return Block(f"what {plan.places[place]} takes of the batch", (enter(plan, place), line))


def enter(plan: StepPlan, place: int) -> str:
    """Write that the step goes on in a place."""
    return f"{plan.carrier}.enter({place})  # {plan.places[place]}"


def at(name: str, place: int) -> str:
    """Return what a place calls a value that it takes."""
    return f"place_{place}_{name}"


def renamed(lines: Sequence[str], names: Collection[str], place: int) -> tuple[str, ...]:
    """Return lines in which a place's own names stand for those that it takes."""
    rows = [line.encode() for line in "\n".join(lines).split("\n")]
    tree = ast.parse(b"\n".join(rows))
    own = free_names(tree) & {*names}
    found = [each for each in ast.walk(tree) if isinstance(each, ast.Name) and each.id in own]
    for each in sorted(found, key=lambda each: (each.lineno, each.col_offset), reverse=True):
        row = rows[each.lineno - 1]
        begin, end = each.col_offset, each.end_col_offset
        rows[each.lineno - 1] = row[:begin] + at(each.id, place).encode() + row[end:]
    return tuple(row.decode() for row in rows)


def free_names(tree: ast.AST) -> set[str]:
    """Return the names in a piece of source, without those that a comprehension binds for itself."""
    bound = [each.target for each in ast.walk(tree) if isinstance(each, ast.comprehension)]
    return named(tree) - {name for each in bound for name in named(each)}


def titled(plan: StepPlan, action: Action, title: str) -> str:
    """Return a title that names the places of an action, not their numbers."""
    lag, peer = f"-{action.lag}" if action.lag else "", ""
    if action.peer is not None:
        peer = f"{'>' if action.kind in SENDS else '<'}{plan.places[action.peer]}"
    return title.replace(str(action), f"{action.kind}{action.index}{lag}@{plan.places[action.rank or 0]}{peer}", 1)
