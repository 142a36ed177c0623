"""Removable blocks: calls of modules that map one value to one value of the same shape and dtype."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch import fx

from dnifx.ir import Program
from dnifx.passes.cuts.calls import calls_by_path, outer_paths
from dnifx.passes.graph import captured, order_of


@dataclass(frozen=True)
class Unit:
    """A call of a module that maps one value to one of the same shape and dtype, so that it can be left out.

    Attributes:
        path: The call.
        nodes: Its nodes.
        input: The value that it takes.
        output: The value that it gives.
    """

    path: str
    nodes: frozenset[fx.Node] = field(repr=False)
    input: fx.Node
    output: fx.Node


def removable(program: Program, behind: AbstractSet[fx.Node], needed: AbstractSet[fx.Node]) -> list[Unit]:
    """Return the blocks that can be left out of a suffix, in order; a series of blocks counts one by one.

    A block of a class of which others can be left out stays whole, even where it changes the shape: of a residual network
    the blocks that begin a stage stay, and are not thinned inside.
    """
    graph = captured(program)
    found = [
        unit
        for path, nodes in calls_by_path(graph).items()
        if (unit := as_unit(program, path, nodes, behind, needed)) is not None
    ]
    found.sort(key=lambda unit: (-len(unit.nodes), -len(unit.path)))
    chosen: list[Unit] = []
    for unit in found:
        if any(unit.nodes & other.nodes for other in chosen):
            continue
        inside = [other for other in found if other.nodes < unit.nodes]
        if not is_series(program, unit, inside):
            chosen.append(unit)
    kinds = {unit.path: block_class(program, unit.path) for unit in chosen}
    blocks = {kind for kind in kinds.values() if kind is not None}
    order = order_of(graph)
    return sorted(
        (
            unit
            for unit in chosen
            if not any(block_class(program, path) in blocks - {kinds[unit.path]} for path in outer_paths(unit.path))
        ),
        key=lambda unit: order[unit.output],
    )


def block_class(program: Program, path: str) -> type | None:
    """Return the class of the module of a call; None for a layer or a container of torch's own."""
    kind = type(program.model.get_submodule(path.partition("@")[0]))
    return None if kind.__module__.startswith("torch.nn.") else kind


def as_unit(
    program: Program, path: str, nodes: Sequence[fx.Node], behind: AbstractSet[fx.Node], needed: AbstractSet[fx.Node]
) -> Unit | None:
    """Return a call as a removable block, or None where it is none.

    It has to multiply matrices, lie behind the boundary as a whole, and be the only reader of the one value that it takes.
    """
    inside = frozenset(nodes)
    if not inside & behind or not inside <= needed or not sum(program.measures[node.name].flops for node in inside):
        return None
    flowing = {node for node in inside if node in behind}
    taken = {
        source
        for node in inside
        for source in node.all_input_nodes
        if source not in inside and carries(program, source)
    }
    given = {
        node
        for node in flowing
        if any(user not in inside for user in node.users) and program.measures[node.name].tensors
    }
    if len(taken) != 1 or len(given) != 1:
        return None
    (source,), (result,) = taken, given
    alike = same_value(program, source, result)
    alone = all(user in inside or sizes_alone(program, user) for user in source.users)
    return Unit(path, inside, source, result) if alike and alone else None


def carries(program: Program, node: fx.Node) -> bool:
    """Whether a value carries a gradient from the boundary's side: no parameter, and no plain number."""
    return node.op != "get_attr" and program.measures[node.name].requires_grad


def same_value(program: Program, one: fx.Node, other: fx.Node) -> bool:
    """Whether two values are tensors of the same shape and dtype."""
    before, after = program.measures[one.name], program.measures[other.name]
    if not (before.is_tensor and after.is_tensor):
        return False
    (first,), (second,) = before.tensors, after.tensors
    return (first.shape, first.dtype) == (second.shape, second.dtype)


def sizes_alone(program: Program, node: fx.Node) -> bool:
    """Whether a node reads of a tensor no more than its size."""
    return node.op != "output" and not program.measures[node.name].tensors


def is_series(program: Program, unit: Unit, inside: Sequence[Unit]) -> bool:
    """Whether a block is a series of smaller ones that hold all its FLOPs."""
    outer = [one for one in inside if not any(one.nodes < other.nodes for other in inside)]
    covered = set().union(*(one.nodes for one in outer)) if outer else set()
    rest = unit.nodes - covered
    several = len({one.nodes for one in outer}) > 1
    return several and not sum(program.measures[node.name].flops for node in rest)
