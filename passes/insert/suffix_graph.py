"""Suffix graphs: what stands behind a boundary, without the blocks that can be left out."""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import fx

from dnifx.errors import EstimatorError
from dnifx.estimators.suffix import Suffix
from dnifx.ir import Boundary, Program
from dnifx.passes.graph import captured, flat_output, left_positions, order_of
from dnifx.passes.insert.removable import removable


@dataclass(frozen=True)
class Thin:
    """A thin suffix, before its modules are copied.

    Attributes:
        graph: From the boundary's values and ``reads`` to the model's flat outputs; None in the places of what forward leaves.
        reads: The names of the captured nodes that it takes beside the values.
        kept: The paths of the removable blocks that it keeps.
        removed: The paths of those that it leaves out.
        readout: The names of its nodes behind the removable blocks.
        draws: Whether it draws random numbers.
        flops: Its FLOPs, while no image is averaged.
        share: Its FLOPs as a share of those of the whole suffix.
        pool: By how many pixels a side images on the boundary are averaged first.
    """

    graph: fx.Graph
    reads: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    readout: frozenset[str]
    draws: bool
    flops: int
    share: float = 1.0
    pool: int = 1

    @property
    def text(self) -> str:
        """What it computes, with the names of the graph's nodes left out, to compare it with that of another input kind."""
        numbers = {node: f"%{number}" for number, node in enumerate(self.graph.nodes)}
        return "\n".join(
            f"{node.op} {node.target if node.op != 'placeholder' else ''} {fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)}"
            for node in self.graph.nodes
        )


def dependent(graph: fx.Graph, values: AbstractSet[str]) -> set[fx.Node]:
    """Return the nodes that depend on values, the values themselves excluded."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if any(source in found or source.name in values for source in node.all_input_nodes) and node.name not in values:
            found.add(node)
    return found


def thin_suffix(boundary: Boundary, options: Suffix, program: Program) -> Thin:
    """Return the suffix of a boundary without its removable blocks, all but a few.

    Raises:
        EstimatorError: The output does not depend on the boundary.
    """
    graph, values = captured(program), set(boundary.values)
    behind = dependent(graph, values)
    needed = unavailable(program, boundary)
    units = removable(program, behind, needed)
    kept, removed = units[: options.blocks], units[options.blocks :]
    thin, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    nodes = {node.name: node for node in graph.nodes}
    for name in boundary.values:
        copies[nodes[name]] = thin.create_node("placeholder", name, name=name)
    stand_in = {unit.output: unit.input for unit in removed}
    live = live_nodes(graph, needed, stand_in, set(copies), left_positions(program))
    reads = [node for node in graph.nodes if node in live and node not in needed and node not in copies]
    for node in reads:
        copies[node] = thin.create_node("placeholder", node.name, name=node.name)
    for node in graph.nodes:
        if node in needed and node in live:
            given = {source: copies[stand_in_for(source, stand_in)] for source in node.all_input_nodes}
            for source in given.keys() & stand_in.keys():  # what stands in for a value may be read elsewhere
                if source.name in program.measures[node.name].writes:
                    given[source] = thin.call_method("clone", (given[source],))
            copies[node] = thin.node_copy(node, given.__getitem__)
    left = left_positions(program)
    outputs = tuple(
        None if place in left else fx.node.map_arg(value, lambda source: copies[stand_in_for(source, stand_in)])
        for place, value in enumerate(flat_output(graph))
    )
    thin.output(outputs)
    if not any(nodes[name].users and copies[nodes[name]].users for name in boundary.values):
        raise EstimatorError(
            f"boundary {boundary.name!r}: the output does not depend on its values, so it has no suffix"
        )
    last = max((order_of(graph)[unit.output] for unit in units), default=-1)
    after = [node for node in graph.nodes if node in copies and node in needed and order_of(graph)[node] > last]
    return Thin(
        graph=thin,
        reads=tuple(node.name for node in reads),
        kept=tuple(unit.path for unit in kept),
        removed=tuple(unit.path for unit in removed),
        readout=frozenset(copies[node].name for node in after) if units else frozenset(last_trained(program, thin)),
        draws=any(program.measures[node.name].random for node in needed if node in live),
        flops=sum(program.measures[node.name].flops for node in needed if node in live),
    )


def last_trained(program: Program, graph: fx.Graph) -> Iterator[str]:
    """Yield the name of the last call of a module with parameters."""
    for node in reversed(graph.nodes):
        if node.op == "call_module" and any(True for _ in program.model.get_submodule(str(node.target)).parameters()):
            yield node.name
            return


def stand_in_for(node: fx.Node, stand_in: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Return the value in whose place a removed block's output stands, through several removed blocks."""
    while node in stand_in:
        node = stand_in[node]
    return node


def live_nodes(
    graph: fx.Graph,
    needed: AbstractSet[fx.Node],
    stand_in: Mapping[fx.Node, fx.Node],
    given: AbstractSet[fx.Node],
    left: AbstractSet[int],
) -> set[fx.Node]:
    """Return what the outputs need: nodes of the suffix, and what these read beside it."""
    waiting: list[fx.Node] = []
    for place, value in enumerate(flat_output(graph)):
        if place not in left:
            fx.node.map_arg(value, waiting.append)
    found: set[fx.Node] = set()
    while waiting:
        node = stand_in_for(waiting.pop(), stand_in)
        if node not in found and node not in given:
            found.add(node)
            waiting += node.all_input_nodes if node in needed else []
    return found


def unavailable(program: Program, boundary: Boundary) -> set[fx.Node]:
    """Return the nodes that a suffix computes: what no partition up to the boundary's producer makes.

    What the producer makes of the boundary's values and gives on without a gradient, such as indices, is read from there.
    """
    return {
        node
        for node in captured(program).nodes
        if node.name not in boundary.values
        and (
            node.op == "get_attr"
            or (node.op.startswith("call") and program.partition_of.get(node.name, 0) > boundary.producer)
        )
        and node.op != "output"
    }


def pooled(graph: fx.Graph, boundary: Boundary, pool: int) -> fx.Graph:
    """Return a copy of a thin suffix that averages the images on the boundary first."""
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    images = {name for name, spec in zip(boundary.values, boundary.specs, strict=True) if spec.is_image}
    for node in graph.nodes:
        copies[node] = made.node_copy(node, copies.__getitem__)
    last = next((node for node in made.nodes if node.op != "placeholder"), None)
    for node in [each for each in made.nodes if each.op == "placeholder"] if pool > 1 and last is not None else ():
        if node.target in images:
            with made.inserting_before(last):
                smaller = made.call_function(torch.nn.functional.avg_pool2d, (node, pool))
            node.replace_all_uses_with(smaller, delete_user_cb=lambda user, new=smaller: user is not new)
    return made
