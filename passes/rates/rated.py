"""Tiers: a captured system, who in it fires together, and what crosses between those that do not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dnifx.ir import Every, Program
from dnifx.passes.graph import captured
from dnifx.runtime.net.states import bound_arguments, follow

BATCH = 1
"""The dimension of inputs and messages that counts examples; windows lie end to end along the one before."""


@dataclass(frozen=True)
class RatedProgram:
    """A captured system and what fires together in it.

    Attributes:
        program: The program, up to its partitions.
        rates: How often each partition fires.
    """

    program: Program
    rates: tuple[Every, ...]

    @property
    def windows(self) -> list[int]:
        """The rates of the parts, the fastest first."""
        return sorted({self.rates[index].windows for index in self.partitions})

    @property
    def partitions(self) -> list[int]:
        """The partitions that compute anything."""
        return [part.index for part in self.program.partitions if part.nodes != ("output",)]

    def partitions_at(self, windows: int) -> list[int]:
        """Return the partitions that fire at a rate."""
        return [index for index in self.partitions if self.rates[index].windows == windows]

    def nodes_at(self, windows: int) -> list[fx.Node]:
        """Return what is computed at a rate, and the numbers it needs that others compute, in the order of the graph."""
        partition_of, graph = set(self.partitions_at(windows)), captured(self.program)
        found = {
            node
            for node in graph.nodes
            if self.program.partition_of.get(node.name) in partition_of and node.op != "output"
        }
        reached = list(found)
        while reached:
            for source in reached.pop().all_input_nodes:
                if source.op != "placeholder" and source not in found and not self.is_tensor(source):
                    found.add(source)
                    reached.append(source)
        return [node for node in graph.nodes if node in found]

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node's value is a tensor."""
        return self.program.measures[node.name].is_tensor

    def crossing(self, source: int, target: int) -> list[fx.Node]:
        """Return the values that what fires at one rate gives to what fires at another, in the order of the graph."""
        inside = set(self.nodes_at(target))
        return [node for node in self.nodes_at(source) if node not in inside and any(u in inside for u in node.users)]

    def gives(self, source: int) -> list[fx.Node]:
        """Return all that what fires at one rate gives to what fires less often, in the order of the graph."""
        targets = [windows for windows in self.windows if windows > source]
        given = {node for target in targets for node in self.crossing(source, target)}
        return [node for node in self.nodes_at(source) if node in given]


def end_to_end(program: Program, windows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs of several windows, laid end to end along the first dimension; states stay as they are."""
    bound = bound_arguments(program.model, program.args, program.kwargs).arguments
    states = {id(leaf) for cut in program.recurrents for leaf in pytree.tree_leaves(follow(bound, cut.state))}

    def repeat(leaf: Tensor) -> Tensor:
        return leaf if id(leaf) in states or not leaf.dim() else torch.cat([leaf.detach()] * windows)

    repeated: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, repeat, (program.args, dict(program.kwargs))
    )
    return repeated
