"""What several passes ask of a program: its graph and inputs, a node's module, the memory that a node reads and writes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dnifx.errors import PassError
from dnifx.ir import Program, module_path

RAGGED = "ragged"
"""In the meta of a captured node whose shape depends on the values of tensors."""

INSERTED = "inserted"
"""In the meta of a node that legalize adds: the name of the node that it stands for."""


def captured(program: Program) -> fx.Graph:
    """Return the program's graph."""
    if program.graph is None:
        raise PassError("the program has no graph yet; run capture first")
    return program.graph


def input_names(program: Program) -> tuple[str, ...]:
    """Return the names of the graph's inputs; none before capture."""
    return () if program.signature is None else program.signature.inputs


def example_tensors(program: Program) -> list[Tensor]:
    """Return the tensors among the example inputs."""
    leaves = pytree.tree_leaves((program.args, dict(program.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def is_on_meta(program: Program) -> bool:
    """Whether the model or its inputs are on the meta device, where tensors hold no values and nothing can be run."""
    return any(tensor.is_meta for tensor in (*program.model.parameters(), *example_tensors(program)))


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the output node of a graph."""
    return graph.output_node()


def left_positions(program: Program) -> frozenset[int]:
    """Return the positions among the flat outputs of what forward leaves on the model: the last ones."""
    left = program.signature.left if program.signature is not None else 0
    size = len(flat_output(captured(program)))
    return frozenset(range(size - left, size))


def flat_output(graph: fx.Graph) -> tuple[Any, ...]:
    """Return the flat values that a graph returns."""
    values = output_of(graph).args[0]
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def order_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the place of each node in a graph."""
    return {node: place for place, node in enumerate(graph.nodes)}


def computing(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that call something: all but inputs, reads of parameters, and the output."""
    return [node for node in graph.nodes if node.op.startswith("call")]


def described(node: fx.Node) -> str:
    """Return a node's name and module, for an error text."""
    return f"{node.name} in module {module_path(node) or '<root>'!r}"


def memory_written(program: Program, node: fx.Node) -> set[int]:
    """Return the memory that a node writes to in place."""
    return {s for name in program.measures[node.name].writes for s in program.measures[name].storages}


def memory_read(program: Program, node: fx.Node) -> set[int]:
    """Return the memory of a node's arguments."""
    return {s for source in node.all_input_nodes for s in program.measures[source.name].storages}


def memory_outside(program: Program) -> set[int]:
    """Return the memory of the inputs, parameters, buffers and constants."""
    sources = [node for node in captured(program).nodes if node.op in ("placeholder", "get_attr")]
    return {s for source in sources for s in program.measures[source.name].storages}


def copied(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph with the same node names and meta."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    output_of(copy).name = output_of(graph).name
    output_of(copy).meta = dict(output_of(graph).meta)
    return copy


def listed(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Return the first few names as text, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
