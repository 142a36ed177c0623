"""Checkpoints: the generated code recomputes in its backward pass what the model recomputes there.

The graph stays flat, and its nodes name the checkpointed regions that they lie in. In generated code each region becomes a
function of its own, which is called under ``torch.utils.checkpoint.checkpoint``.
"""

import textwrap
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import count, groupby

from torch import fx

from dnifx.runtime.emitted.text import comment

CHECKPOINT = "checkpoint"
"""The key in a node's meta: the checkpointed regions that it lies in, outermost first."""

Line = tuple[fx.Node, str]
"""A node and the text that computes it."""


@dataclass(frozen=True)
class Region:
    """One call under a checkpoint.

    Attributes:
        number: Its number among those of a recording.
        place: Where it is in the model's source.
        preserve: Whether recomputation draws the same random numbers (``preserve_rng_state``).
        early_stop: Whether recomputation ends with the last tensor that is needed.
    """

    number: int
    place: str
    preserve: bool = True
    early_stop: bool = True


def regions_of(node: fx.Node) -> tuple[Region, ...]:
    """Return the checkpointed regions that a node is computed in, outermost first."""
    found: tuple[Region, ...] = node.meta.get(CHECKPOINT, ()) if node.op != "placeholder" else ()
    return found


def written(lines: Sequence[Line], depth: int, taken: AbstractSet[str]) -> str:
    """Return the text of nodes that lie in the same regions down to a depth; functions get names that are not taken."""
    parts = []
    for found, group in groupby(lines, key=lambda line: regions_of(line[0])[depth : depth + 1]):
        members = list(group)
        parts.append(region_text(found[0], members, depth, taken) if found else "".join(text for _, text in members))
    return "".join(parts)


def region_text(region: Region, lines: Sequence[Line], depth: int, taken: AbstractSet[str]) -> str:
    """Return the text of a region: a function, and its call under a checkpoint."""
    inside = {node for node, _ in lines}
    body = written(lines, depth + 1, taken)
    given = dict.fromkeys(source for node, _ in lines for source in node.all_input_nodes if source not in inside)
    made = [node for node, _ in lines if any(user not in inside for user in node.users)]
    if not made:
        return body
    name = next(name for name in (f"region{'_' * more}{made[-1].name}" for more in count(1)) if name not in taken)
    results = ", ".join(node.name for node in made)
    options = ["use_reentrant = False"]
    options += [] if region.preserve else ["preserve_rng_state = False"]
    options += [] if region.early_stop else ["early_stop = False"]
    dead = [node.name for node in given if max(node.users) in inside]
    return (
        f"def {name}({', '.join(node.name for node in given)}):  # {comment(region.place)}\n"
        f"{textwrap.indent(body, '    ')}"
        f"    return {results}\n"
        f"{results} = torch.utils.checkpoint.checkpoint({', '.join([name, *(node.name for node in given), *options])})"
        f"{';  ' + ' = '.join([*dead, 'None']) if dead else ''}\n"
    )
