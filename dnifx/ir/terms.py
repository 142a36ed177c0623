"""What forward leaves on the model with a gradient: terms that a loss may be made of."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from dnifx.ir.program import Program


@dataclass(frozen=True)
class Term:
    """A value with a gradient that forward leaves on the model.

    Attributes:
        path: The attribute, as people write it: ``self.moe.balance``, or ``self.losses[1]`` where it holds several values.
        attribute: The attribute without its root, as own losses name it: ``moe.balance``.
        value: Name of the node that makes it.
        place: Its place among the flat outputs.
        partition: Index of the partition that makes it.
        names: The names among ``Program.own_losses`` that match the attribute.
        is_state: Whether forward reads the attribute too.
    """

    path: str
    attribute: str
    value: str
    place: int
    partition: int
    names: tuple[str, ...]
    is_state: bool


def terms(program: Program) -> tuple[Term, ...]:
    """Return the values with a gradient that forward leaves on the model."""
    if program.signature is None or program.graph is None or program.parts:
        return ()
    flat: Any = program.graph.output_node().args[0]
    paths, last = program.signature.left_at, len(program.partitions) - 1
    found = []
    for index, (path, result) in enumerate(zip(paths, program.signature.results, strict=True)):
        place = len(flat) - len(paths) + index
        name: str = flat[place].name
        measure = program.measures[name]
        if measure.requires_grad and measure.is_tensor:
            attribute = path.removeprefix("self.")
            names = tuple(each for each in program.own_losses if fnmatchcase(attribute, each.removeprefix("self.")))
            shown = path if paths.count(path) == 1 else f"{path}[{index - paths.index(path)}]"
            home = program.partition_of.get(name, last)
            found.append(Term(shown, attribute, name, place, home, names, result is None))
    return tuple(found)
