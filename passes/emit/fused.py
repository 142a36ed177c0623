"""Emit: the fused graph, one program with an interface node on every boundary."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dnifx.errors import ContextError, PassError
from dnifx.ir import Boundary, Context, Interface, Program
from dnifx.passes.capture.signature import forward_signature
from dnifx.passes.graph import captured
from dnifx.passes.measure import data_inputs, examples_of
from dnifx.passes.pipeline import Pass
from dnifx.runtime.emitted.interface import (
    count_only,
    feed_back,
    leak_gradient,
    scheduled_alone,
    swap_gradients,
    swap_inputs,
)

CONTEXT = "context"
INPUT_MODELS = "input_models"


@dataclass(frozen=True)
class EmitFused(Pass):
    """Write the whole model as one graph, partition after partition, each followed by its interface nodes.

    Attributes:
        mean: Whether the loss averages over examples (else it sums), which scales synthetic gradients.
    """

    mean: bool = True
    name: ClassVar[str] = "emit"
    requires: ClassVar[tuple[str, ...]] = ("graph", "partitions", "submodules")
    ensures: ClassVar[tuple[str, ...]] = ("fused",)

    def run(self, program: Program) -> Program:
        """Write the fused graph."""
        return replace(program, fused=fuse(program, self.mean))

    def check(self, program: Program) -> None:
        """The graph is well formed."""
        if program.fused is None:
            raise PassError("emit gave no graph")
        program.fused.lint()


def interface_root(model: nn.Module, name: str = "interfaces") -> str:
    """Return the attribute under which estimators (or input models) live: ``name``, unless the model has one like that."""
    while name in dir(model) or name in dict(model.named_children()):
        name += "_"
    return name


@dataclass
class End:
    """What waits for the end of the fused graph.

    Attributes:
        errors: The boundaries whose estimators answer from the output's error, each with the nodes of its values.
        predictions: The nodes of what critics predict of the loss.
    """

    errors: list[tuple[Boundary, list[fx.Node]]] = field(default_factory=list)
    predictions: list[fx.Node] = field(default_factory=list)


def fuse(program: Program, mean: bool) -> fx.Graph:
    """Return the model's graph with estimators and interface nodes between the partitions."""
    source = captured(program)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    context = context_node(graph, program)
    examples = examples_node(graph, program, copies)
    features = features_node(graph, program.context, context, program)
    nodes = {node.name: node for node in source.nodes}
    crossing: dict[fx.Node, fx.Node] = {}
    end = End()
    for partition in program.partitions:
        seen = {**copies, **crossing}
        for name in partition.nodes:
            node = nodes[name]
            if node.op == "output":
                outputs = fx.node.map_arg(node.args[0], seen.__getitem__)
                graph.output(end_nodes(graph, program, end, outputs, examples, mean))
            else:
                seen[node] = copies[node] = graph.node_copy(node, seen.__getitem__)
        for boundary in program.boundaries:
            if boundary.producer == partition.index:
                values = [nodes[value] for value in boundary.values]
                swapped = interface_nodes(
                    graph, program, boundary, [copies[value] for value in values], features, examples, mean, end
                )
                crossing.update(zip(values, swapped, strict=True))
    return graph


def context_node(graph: fx.Graph, program: Program) -> fx.Node | None:
    """Add the context's placeholder, where estimators see one."""
    if program.context is None:
        return None
    if CONTEXT in forward_signature(program.model).parameters:
        raise ContextError(
            f"{type(program.model).__name__} has an input named {CONTEXT!r}, which is what the estimators' context is called; "
            "rename the model's input"
        )
    return graph.create_node("placeholder", CONTEXT, (None,), {}, name=CONTEXT)


def examples_node(graph: fx.Graph, program: Program, copies: Mapping[fx.Node, fx.Node]) -> fx.Node | int:
    """Add the node that counts the examples of a batch."""
    found = examples_of(program)
    if found is None:
        return 1
    name, dim = found
    batch = next(copy for node, copy in copies.items() if node.name == name)
    return graph.create_node("call_method", "size", (batch, dim), name="examples")


def features_node(graph: fx.Graph, context: Context | None, node: fx.Node | None, program: Program) -> fx.Node | None:
    """Add the nodes that turn a label into features, once for all estimators; a callable's features come as they are."""
    if context is None or node is None or not program.boundaries:
        return None
    made = node
    if context.classes is not None:
        one_hot = torch.nn.functional.one_hot
        made = graph.create_node("call_function", one_hot, (node, context.classes), name="one_hot_context")
    return graph.create_node("call_method", "to", (made, program.boundaries[0].specs[0].dtype), name="features")


def interface_nodes(
    graph: fx.Graph,
    program: Program,
    boundary: Boundary,
    values: list[fx.Node],
    features: fx.Node | None,
    examples: fx.Node | int,
    mean: bool,
    end: End,
) -> list[fx.Node]:
    """Add one boundary's estimator and interface node; return what its consumers read."""
    interface = program.interfaces[boundary.index]
    if interface.locked and not interface.blends:
        return values
    if interface.scheduled_only(windows=bool(program.recurrences)):
        alone = graph.create_node("call_function", scheduled_alone, (tuple(values), boundary.name))
        return list(items(graph, alone, len(values)))
    if interface.needs_error:
        end.errors.append((boundary, values))
        return [graph.create_node("call_method", "detach", (value,), name=f"{value.name}_crossing") for value in values]
    seen = masked(graph, program, tuple(seen_node(graph, value, interface, examples, mean) for value in values))
    target = f"{interface_root(program.model)}.{boundary.key}"
    asked = (seen, features, *mask_nodes(graph, program)) if interface.needs_mask else (seen, features)
    estimates = graph.create_node("call_module", target, asked, name=f"estimate_{boundary.key}")
    estimates.meta["provenance"] = provenance(boundary, interface)
    each = masked(graph, program, items(graph, estimates, len(values)))
    if interface.needs_loss:
        end.predictions.append(graph.create_node("call_function", operator.getitem, (estimates, len(values))))
    swap: Any = swap_gradients
    given: tuple[Any, ...] = (tuple(values), each, examples, mean)
    if interface.input_model is not None:
        imagined = masked(graph, program, items(graph, imagined_node(graph, program, boundary, features), len(values)))
        swap, given = swap_inputs, (tuple(values), each, imagined, examples, mean)
    given += (interface.mix,) if interface.mix else ()
    swapped = graph.create_node("call_function", swap, given, name=f"swap_{boundary.key}")
    return [
        graph.create_node("call_function", operator.getitem, (swapped, i), name=f"{value.name}_crossing")
        for i, value in enumerate(values)
    ]


def end_nodes(graph: fx.Graph, program: Program, end: End, outputs: Any, examples: fx.Node | int, mean: bool) -> Any:
    """Return what the graph gives: the outputs, through the node of the error; and beside them the predictions of the loss."""
    if end.errors:
        root = interface_root(program.model)
        estimators = tuple(graph.get_attr(f"{root}.{boundary.key}") for boundary, _ in end.errors)
        for node, (boundary, _) in zip(estimators, end.errors, strict=True):
            node.meta["provenance"] = provenance(boundary, program.interfaces[boundary.index])
        given: tuple[Any, ...] = (
            outputs[0],
            tuple(tuple(values) for _, values in end.errors),
            estimators,
            examples,
            mean,
        )
        given += tuple(mask_nodes(graph, program))
        outputs = (graph.create_node("call_function", feed_back, given),)
    return (outputs, tuple(end.predictions)) if end.predictions else outputs


def seen_node(graph: fx.Graph, value: fx.Node, interface: Interface, examples: fx.Node | int, mean: bool) -> fx.Node:
    """Add the node of a value as the estimator sees it: detached, but for the gradient of its own loss if that is wanted."""
    if interface.prop:
        given = (value, interface.prop * (1 - interface.mix), examples, mean)
        return graph.create_node("call_function", leak_gradient, given, name=f"{value.name}_leaking")
    return graph.create_node("call_method", "detach", (value,), name=f"{value.name}_detached")


def items(graph: fx.Graph, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
    """Add the nodes that take a tuple apart."""
    return tuple(graph.create_node("call_function", operator.getitem, (node, index)) for index in range(count))


def mask_nodes(graph: fx.Graph, program: Program) -> list[fx.Node]:
    """Return the node of the mask, where there is one."""
    return [node for node in graph.nodes if node.op == "placeholder" and node.name == program.mask]


def masked(graph: fx.Graph, program: Program, tensors: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Add the nodes that leave out tokens that do not count, where there is a mask."""
    for mask in mask_nodes(graph, program):
        tensors = tuple(graph.create_node("call_function", count_only, (tensor, mask)) for tensor in tensors)
    return tensors


def imagined_node(graph: fx.Graph, program: Program, boundary: Boundary, features: fx.Node | None) -> fx.Node:
    """Add the call of a boundary's input model on the model's own inputs."""
    names = data_inputs(program)
    inputs = tuple(node for node in graph.nodes if node.op == "placeholder" and node.name in names)
    inputs = masked(graph, program, inputs)
    target = f"{interface_root(program.model, INPUT_MODELS)}.{boundary.key}"
    return graph.create_node("call_module", target, (inputs, features), name=f"imagine_{boundary.key}")


def provenance(boundary: Boundary, interface: Interface) -> str:
    """Say where an interface comes from, as a comment in emitted code."""
    count = sum(parameter.numel() for parameter in interface.estimator.parameters())
    return f"cut after {boundary.name}; estimator {interface.description}, {count:,} parameters"
