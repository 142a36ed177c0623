"""What every pass asks of a captured graph: its output, the module that a node lies in, a copy."""

from typing import Any

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Program

INSERTED = "inserted"
"""In the meta of a node that legalize adds: the name of the node that it stands for."""


def captured(program: Program) -> fx.Graph:
    """Return the program's graph."""
    if program.graph is None:
        raise PassError("the program has no graph yet; run capture first")
    return program.graph


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the output node of a graph."""
    output: fx.Node = next(iter(reversed(graph.nodes)))
    return output


def flat_output(graph: fx.Graph) -> tuple[Any, ...]:
    """Return the flat values that a graph returns."""
    values = output_of(graph).args[0]
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a node lies in or calls; empty for the root."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return next((entry[0] for entry in reversed(stack.values())), "")


def copied(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph with the same node names and meta."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    output_of(copy).name = output_of(graph).name
    output_of(copy).meta = dict(output_of(graph).meta)
    return copy
