"""Split: one graph for each partition.

torch.fx's split_module renames the parameters and submodules of each part; here module paths stay the model's own, so each
part is copied node by node instead.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Partition, Program
from dnifx.passes.graph import captured
from dnifx.passes.pipeline import Pass


@dataclass(frozen=True)
class SplitPartitions(Pass):
    """Copy each partition's nodes to a graph of its own: inputs by name, outputs as a tuple."""

    name: ClassVar[str] = "split"
    requires: ClassVar[tuple[str, ...]] = ("graph", "partitions")
    ensures: ClassVar[tuple[str, ...]] = ("submodules",)

    def run(self, program: Program) -> Program:
        """Make the graphs."""
        nodes = {node.name: node for node in captured(program).nodes}
        return replace(program, submodules=tuple(part_graph(nodes, partition) for partition in program.partitions))

    def check(self, program: Program) -> None:
        """Every graph is well formed and together they hold each node once."""
        for graph in program.submodules:
            graph.lint()
        expected, *made = (
            sum(node.op not in ("placeholder", "output") for node in graph.nodes)
            for graph in (captured(program), *program.submodules)
        )
        if sum(made) != expected:
            raise PassError(f"split made {sum(made)} nodes of {expected}")


def part_graph(nodes: dict[str, fx.Node], partition: Partition) -> fx.Graph:
    """Copy one partition; the last one, which holds the model's output node, returns the model's flat output."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for name in partition.inputs:
        copies[nodes[name]] = graph.create_node("placeholder", name, name=name)
        copies[nodes[name]].meta = dict(nodes[name].meta)
    for name in partition.nodes:
        node = nodes[name]
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    output = next((nodes[name] for name in partition.nodes if nodes[name].op == "output"), None)
    values = tuple(nodes[name] for name in partition.outputs) if output is None else output.args[0]
    graph.output(fx.node.map_arg(values, copies.__getitem__))
    return graph
