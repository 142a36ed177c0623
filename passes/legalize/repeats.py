"""Repeats: what is computed from parameters and sizes alone is no message; each partition that reads it computes it itself."""

from collections.abc import Set as AbstractSet

from torch import fx

from dnifx.errors import LegalizeError
from dnifx.ir import Program
from dnifx.passes.graph import INSERTED, module_path
from dnifx.passes.legalize.writes import add_clone
from dnifx.passes.measure import is_pure, node_parameters


def repeat_parameters(graph: fx.Graph, program: Program, partition_of: dict[str, int]) -> list[str]:
    """Compute again, in every partition that reads it, what a partition made of parameters for others.

    A reshaped weight or a slice of position embeddings belongs to no example, so that no estimator can say its gradient, and
    as a view of a parameter it would change when its owner updates that. Computed in each partition that reads it, it is
    like any parameter that several partitions share: the gradients of all reach the parameters before their one update.

    Args:
        graph: The graph, changed in place.
        program: The program, for its measures.
        partition_of: The partition of each node by name; those of the copies are added.

    Returns:
        Notes on what was repeated.

    Raises:
        LegalizeError: A value that shares a trainable parameter's memory crosses, and can neither be repeated nor cloned.
    """
    trained = trained_memory(graph, program)
    written = written_memory(graph, program)
    own = made_of_parameters(graph, program, written)
    repeated = []
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        measure = program.measures[node.name]
        aliased = bool(trained & set(measure.storages))
        away = sorted({partition_of[user.name] for user in node.users} - {partition_of[node.name]})
        if away and node in own and (aliased or measure.requires_grad):
            for home in settled(node, partition_of, away):
                copy_into(graph, node, partition_of, home)
            repeated += [node.name] if node.op != "get_attr" else []
        elif away and aliased and measure.is_tensor and not written & set(measure.storages):
            add_clone(
                graph, node, [user for user in node.users if partition_of[user.name] in away], partition_of, False
            )
        elif away and aliased and node.op != "get_attr":
            raise LegalizeError(refusal(node, partition_of, away[0]))
    names = ", ".join(reversed(repeated[-3:])) + (f" and {len(repeated) - 3} more" if len(repeated) > 3 else "")
    return [f"each partition that reads {names} computes it of its parameters by itself"] if repeated else []


def trained_memory(graph: fx.Graph, program: Program) -> set[int]:
    """Return the memory of trainable parameters, which their owner's update changes."""
    return {
        storage
        for node in graph.nodes
        if node.op == "get_attr"
        and any(each.requires_grad for each in node_parameters(program.model, node, program.constants).values())
        for storage in program.measures[node.name].storages
    }


def written_memory(graph: fx.Graph, program: Program) -> set[int]:
    """Return the memory that some node writes to in place."""
    measures = program.measures
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    return {storage for node in calls for name in measures[node.name].writes for storage in measures[name].storages}


def made_of_parameters(graph: fx.Graph, program: Program, written: AbstractSet[int]) -> set[fx.Node]:
    """Return the nodes that give the same whenever they run in a step: of parameters, buffers and sizes, none written to."""
    measures = program.measures
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or written & set(measures[node.name].storages):
            continue
        given = [source for source in node.all_input_nodes if measures[source.name].tensors]
        if node.op == "get_attr" or (given and all(source in found for source in given) and is_pure(program, node)):
            found.add(node)
    return found


def settled(node: fx.Node, partition_of: dict[str, int], away: list[int]) -> list[int]:
    """Move a node that its own partition does not read to the first that does; return those that need a copy."""
    if any(partition_of[user.name] == partition_of[node.name] for user in node.users):
        return away
    partition_of[node.name] = away[0]
    return away[1:]


def copy_into(graph: fx.Graph, node: fx.Node, partition_of: dict[str, int], home: int) -> None:
    """Copy a node into a partition, for its readers there."""
    readers = [user for user in node.users if partition_of[user.name] == home]
    with graph.inserting_before(min(readers)):
        copy = graph.node_copy(node, lambda source: source)
    copy.meta = {**node.meta, INSERTED: node.meta.get(INSERTED, node.name)}
    partition_of[copy.name] = home
    for reader in readers:
        reader.replace_input_with(node, copy)


def refusal(node: fx.Node, partition_of: dict[str, int], home: int) -> str:
    """Say which view of a parameter crosses."""
    return (
        f"{node.name} in module {module_path(node) or '<root>'!r} shares the memory of a trainable parameter and crosses from "
        f"submod_{partition_of[node.name]} into submod_{home}, where that parameter may have been updated; clone it in the model, or cut "
        "elsewhere"
    )
