"""Containers: what crosses a cut is a tensor or a plain value; a tuple, list or dict is taken apart where it is made."""

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from dnifx.errors import LegalizeError
from dnifx.ir import Holder, Program
from dnifx.passes.capture.record.functions import PIECES, name_of
from dnifx.passes.cuts.places import READS, read_whole
from dnifx.passes.graph import INSERTED, captured, described
from dnifx.passes.measure import MeasureNodes
from dnifx.runtime.emitted.ops import guard, guard_length, rebuild
from dnifx.runtime.net.input_kinds import SIZES_ALONE


def without_containers(program: Program) -> Program:
    """Let only tensors and plain values cross a cut; the graph, which is legalize's own copy, is changed in place.

    Items of a tuple are taken where it is made, and an object is made where it is read. A tuple, list or dict that is read as
    a whole is rebuilt from its items for its readers. A guard beside its items fires where it holds others than at capture.

    Raises:
        LegalizeError: An object of another class crosses, or a list or dict that a module may fill for others to read.
    """
    partition_of, graph = dict(program.partition_of), captured(program)
    guards = sum(unpack(graph, program, partition_of, node) for node in list(graph.nodes) if node.op != "output")
    found = replace(program, graph=graph, partition_of=renumbered(partition_of))
    if not guards:
        return found
    capture = program.capture and replace(program.capture, guards=program.capture.guards + guards)
    return MeasureNodes().run(replace(found, capture=capture))


def unpack(graph: fx.Graph, program: Program, partition_of: dict[str, int], node: fx.Node) -> int:
    """Take a container apart if it crosses a cut, and return the number of guards that were added."""
    measure = program.measures[node.name]
    crossing = [user for user in node.users if partition_of[user.name] != partition_of.get(node.name)]
    if node.op == "placeholder" or measure.is_tensor or not measure.tensors or not crossing:
        return 0
    if node.target is rebuild and len({partition_of[user.name] for user in node.users}) == 1:
        partition_of[node.name] = partition_of[crossing[0].name]
        return 0
    whole = [user for user in crossing if user.op != "call_function" or user.target not in READS]
    for user in crossing:
        if user not in whole:
            move(user, partition_of, partition_of[node.name])
    if not whole:
        return 0
    refusal = read_whole(node, measure.holder, whole)
    if refusal:
        raise LegalizeError(
            f"{refusal}; cut where its tensors are taken out, give each reader a tuple of its own, or keep all in one partition"
        )
    added: list[fx.Node] = []
    with graph.inserting_before(node.next):
        parts = taken_apart(graph, node, measure.holder, added)
    for each in added:
        partition_of[each.name] = partition_of[node.name]
        each.meta = {**node.meta, **each.meta, INSERTED: node.meta.get(INSERTED, node.name)}
    for user in whole:
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda each: parts if each is node else each)
    guards = [each for each in added if each.target in (guard, guard_length)]
    for each in guards if sizes_decide(program, node) else ():
        each.meta[SIZES_ALONE] = True
    return len(guards)


def taken_apart(graph: fx.Graph, node: fx.Node, holder: Holder | None, added: list[fx.Node]) -> Any:
    """Add the nodes that guard a container and take its parts out; return the container of these nodes."""
    if holder is None:
        return node
    where = described(node)
    if holder.kind is dict:
        added.append(graph.call_function(tuple, (node,)))
        added.append(graph.call_function(guard, (added[-1], tuple(key for key, _ in holder.parts), where)))
    else:
        added.append(graph.call_function(guard_length, (node, len(holder.parts), where)))
    parts = [(key, graph.call_function(operator.getitem, (node, key)), part) for key, part in holder.parts]
    added += [made for _, made, _ in parts]
    found = [(key, taken_apart(graph, made, part, added)) for key, made, part in parts]
    return dict(found) if holder.kind is dict else holder.kind(made for _, made in found)


def sizes_decide(program: Program, node: fx.Node) -> bool:
    """Whether sizes alone decide how many parts a container has: it comes from a split, or from a module of torch."""
    while node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.op == "call_module":
        return type(program.model.get_submodule(str(node.target))).__module__.startswith("torch.nn.")
    return name_of(node.target) in PIECES


def renumbered(partition_of: Mapping[str, int]) -> dict[str, int]:
    """Number the partitions without gaps."""
    order = {old: new for new, old in enumerate(sorted(set(partition_of.values())))}
    return {name: order[index] for name, index in partition_of.items()}


def move(node: fx.Node, partition_of: dict[str, int], index: int) -> None:
    """Move a node, and the parameters that it reads, to another partition."""
    partition_of[node.name] = index
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            partition_of[source.name] = index
