"""Emit: how the interface nodes of the fused graph learn what the loss is multiplied by."""

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Program
from dnifx.passes.emit.fused import own_input
from dnifx.passes.graph import captured, copied, flat_output, left_positions, output_of
from dnifx.passes.pipeline import Pass
from dnifx.passes.time.states import state_positions
from dnifx.runtime.emitted.ends import feed_back
from dnifx.runtime.emitted.interface import swap_gradients
from dnifx.runtime.emitted.loss_scale import tell_factor
from dnifx.runtime.emitted.messages import swap_messages
from dnifx.runtime.emitted.windows import end_window, start_window

LOSS_SCALE = "loss_scale"
"""Name of the input that says what the loss is multiplied by."""

TOLD = (swap_gradients, swap_messages, start_window, end_window)
"""The interface nodes that can be told by the loss itself. An estimator that sees the output's error stands behind the loss."""


@dataclass(frozen=True)
class EmitLossScale(Pass):
    """Give every interface node the loss scale.

    The fused graph gets one more input, which says it. Where the graph computes the loss, the gradient that arrives there says
    it too: then the nodes return one more value, and the loss takes these, so that the factor comes to each as its gradient.
    """

    name: ClassVar[str] = "loss_scale"
    requires: ClassVar[tuple[str, ...]] = ("fused",)
    ensures: ClassVar[tuple[str, ...]] = ("fused",)

    def run(self, program: Program) -> Program:
        """Write the graph."""
        if program.fused is None:
            raise PassError("the program was not emitted; run emit first")
        return replace(program, fused=with_loss_scale(program, copied(program.fused)))

    def check(self, program: Program) -> None:
        """The graph is well formed."""
        if program.fused is not None:
            program.fused.lint()


def with_loss_scale(program: Program, graph: fx.Graph) -> fx.Graph:
    """Return the fused graph with the loss scale at every interface node; it is changed in place."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target in (*TOLD, feed_back)]
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(next(iter(graph.nodes))):
        scale = own_input(graph, LOSS_SCALE)
    for node in nodes:
        node.kwargs = {**node.kwargs, "loss_scale": scale}
    places, told = loss_places(program), [node for node in nodes if node.target in TOLD]
    if not places or not told:
        return graph
    output = output_of(graph)
    with graph.inserting_before(output):
        for node in told:
            node.kwargs = {**node.kwargs, "told": True}
        factors = tuple(graph.call_function(operator.getitem, (node, values_of(node))) for node in told)
        returned: Any = output.args[0]
        predicts = isinstance(returned[0], tuple)
        flat = list(returned[0] if predicts else returned)
        loss = graph.call_function(tell_factor, (flat[places[0]], factors))
        for place in places:
            flat[place] = loss
    output.args = ((tuple(flat), *returned[1:]) if predicts else tuple(flat),)
    return graph


def values_of(node: fx.Node) -> int:
    """Return how many values an interface node passes on."""
    values = node.args[0]
    return len(values) if isinstance(values, tuple | list) else 1


def loss_places(program: Program) -> list[int]:
    """Return the places among the flat outputs of the loss that the model computes itself; none where it computes none.

    It is a scalar with a gradient, and every other output that carries one is on its way. So a penalty that is returned beside
    the output, such as that of a router, is no loss.
    """
    left = left_positions(program) | state_positions(program)
    carrying: dict[fx.Node, list[int]] = {}
    for place, node in enumerate(flat_output(captured(program))):
        if isinstance(node, fx.Node) and place not in left and program.measures[node.name].requires_grad:
            carrying.setdefault(node, []).append(place)
    found = [
        places
        for node, places in carrying.items()
        if is_scalar(program, node) and carrying.keys() - {node} <= before(node)
    ]
    return found[0] if found else []


def is_scalar(program: Program, node: fx.Node) -> bool:
    """Whether a node makes a tensor without dimensions."""
    measure = program.measures[node.name]
    return measure.is_tensor and measure.tensors[0].shape == ()


def before(node: fx.Node) -> set[fx.Node]:
    """Return all nodes that a node is computed from."""
    found: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found
