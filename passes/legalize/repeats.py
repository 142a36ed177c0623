"""Repeats: a value made of parameters and sizes alone does not cross a cut; each partition that reads it computes it."""

from torch import fx

from dnifx.errors import LegalizeError
from dnifx.ir import Program
from dnifx.passes.graph import INSERTED, captured, described, listed
from dnifx.passes.legalize.writes import add_clone
from dnifx.passes.measure import made_of_parameters, trains, written_memory


def repeat_parameters(program: Program, partition_of: dict[str, int]) -> list[str]:
    """Compute values made of parameters alone again in every partition that reads them.

    A reshaped weight or a slice of position embeddings belongs to no example, so no estimator can predict its gradient. As a
    view of a parameter it would also change when its owner updates the parameter. Computed in each partition that reads it,
    it is like any parameter that several partitions share: the parameter is updated once, with the gradients of all.

    Args:
        program: The program; its graph is changed in place.
        partition_of: The partition of each node by name; those of the copies are added.

    Returns:
        Notes on what is repeated.

    Raises:
        LegalizeError: A value that shares a trainable parameter's memory crosses, and can neither be repeated nor cloned.
    """
    graph = captured(program)
    trained, written = trained_memory(program), written_memory(program)
    repeatable = made_of_parameters(program, written)
    repeated = []
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        measure = program.measures[node.name]
        shares = bool(trained & set(measure.storages))
        away = sorted({partition_of[user.name] for user in node.users} - {partition_of[node.name]})
        if away and node in repeatable and (shares or measure.requires_grad):
            for index in move_if_unread(node, partition_of, away):
                copy_into(graph, node, partition_of, index)
            repeated += [node.name] if node.op != "get_attr" else []
        elif away and shares and measure.is_tensor and not written & set(measure.storages):
            readers = [user for user in node.users if partition_of[user.name] in away]
            add_clone(graph, node, readers, partition_of, at_reader=False)
        elif away and shares and node.op != "get_attr":
            raise LegalizeError(
                f"{described(node)} shares the memory of a trainable parameter and crosses from submod_{partition_of[node.name]} into "
                f"submod_{away[0]}, where that parameter may have been updated; clone it in the model, or cut elsewhere"
            )
    return [f"each partition that reads {listed(repeated[::-1])} computes it from its parameters"] if repeated else []


def trained_memory(program: Program) -> set[int]:
    """Return the memory of trainable parameters, which their owner's update changes."""
    return {
        storage
        for node in captured(program).nodes
        if node.op == "get_attr" and trains(program, node)
        for storage in program.measures[node.name].storages
    }


def move_if_unread(node: fx.Node, partition_of: dict[str, int], away: list[int]) -> list[int]:
    """Move a node that its own partition does not read to the first that does; return those that need a copy."""
    if any(partition_of[user.name] == partition_of[node.name] for user in node.users):
        return away
    partition_of[node.name] = away[0]
    return away[1:]


def copy_into(graph: fx.Graph, node: fx.Node, partition_of: dict[str, int], index: int) -> None:
    """Copy a node into a partition, for its readers there."""
    readers = [user for user in node.users if partition_of[user.name] == index]
    with graph.inserting_before(min(readers)):
        copy = graph.node_copy(node, lambda source: source)
    copy.meta = {**node.meta, INSERTED: node.meta.get(INSERTED, node.name)}
    partition_of[copy.name] = index
    for reader in readers:
        reader.replace_input_with(node, copy)
