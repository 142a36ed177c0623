"""Emit: the fused graph, one program with an interface node on every boundary."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dnifx.errors import PassError
from dnifx.ir import Boundary, Interface, Message, Program, count_parameters, free_attribute
from dnifx.passes.graph import captured, flat_output, left_positions
from dnifx.passes.measure import data_inputs, examples_of
from dnifx.passes.pipeline import Pass
from dnifx.runtime.emitted.ends import feed_back, scheduled_alone
from dnifx.runtime.emitted.fitting import count_only
from dnifx.runtime.emitted.interface import leak_gradient, swap_gradients
from dnifx.runtime.emitted.messages import swap_messages

CONTEXT = "context"
TARGET = "target"
INPUT_MODELS = "input_models"
EXAMPLES = "examples"
"""In the meta of the node that counts the examples."""
SOURCE = "source"
"""In the meta of a node of the fused graph: the name of the captured node that it copies. Its own name may be another."""


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
    """Return the attribute that holds estimators or input models: ``name``, or another where the model has that one."""
    return free_attribute(model, name)


def fuse(program: Program, mean: bool) -> fx.Graph:
    """Return the model's graph with estimators and interface nodes between the partitions."""
    source, graph = captured(program), fx.Graph()
    copies = {node: graph.node_copy(node) for node in source.nodes if node.op == "placeholder"}
    for node, copy in copies.items():
        copy.meta[SOURCE] = node.name
    context = context_node(graph, program)
    target = target_node(graph, program)
    examples = examples_node(graph, program)
    writer = FusedWriter(program, graph, mean, examples, features_node(graph, program, context), target)
    nodes = {node.name: node for node in source.nodes}
    crossing: dict[fx.Node, fx.Node] = {}
    left = left_positions(program)
    sent = [name for each in program.messages for name in each.boundary.values]  # each part returns its own outputs
    for partition in program.partitions:
        seen = {**copies, **crossing}
        for name in partition.nodes:
            node = nodes[name]
            if node.op == "output":
                returned = {**seen, **{nodes[name]: copies[nodes[name]] for name in sent}}
                flat = [
                    fx.node.map_arg(value, (copies if position in left else returned).__getitem__)
                    for position, value in enumerate(flat_output(source))
                ]
                graph.output(writer.end(tuple(flat)))
            else:
                seen[node] = copies[node] = graph.node_copy(node, seen.__getitem__)
                copies[node].meta[SOURCE] = node.name
        for boundary in program.boundaries:
            if boundary.producer == partition.index:
                values = [nodes[value] for value in boundary.values]
                crossed = writer.interface(boundary, tuple(copies[value] for value in values))
                crossing.update(zip(values, crossed, strict=True))
    return graph


def context_node(graph: fx.Graph, program: Program) -> fx.Node | None:
    """Add the context's placeholder, where estimators see one."""
    if program.context is None:
        return None
    return own_input(graph, CONTEXT)


def own_input(graph: fx.Graph, name: str) -> fx.Node:
    """Add an input of the net itself, None by default; it gets another name where the model has an input of that name."""
    node = graph.create_node("placeholder", name, (None,), {}, name=name)
    node.target = node.name
    return node


def target_node(graph: fx.Graph, program: Program) -> fx.Node | None:
    """Add the target's placeholder, where suffixes compare their output with it."""
    return own_input(graph, TARGET) if any(each.needs_answer for each in program.interfaces) else None


def examples_node(graph: fx.Graph, program: Program) -> fx.Node | int:
    """Add the node that counts the examples of a batch."""
    found = examples_of(program)
    if found is None:
        return 1
    name, dim = found
    node = graph.create_node("call_method", "size", (*placeholders(graph, name), dim), name="examples")
    node.meta[EXAMPLES] = True
    return node


def features_node(graph: fx.Graph, program: Program, node: fx.Node | None) -> fx.Node | None:
    """Add the nodes that turn a label into features, once for all estimators. A callable makes features itself."""
    if program.context is None or node is None or not program.boundaries:
        return None
    if program.context.classes is not None:
        one_hot = torch.nn.functional.one_hot
        node = graph.create_node("call_function", one_hot, (node, program.context.classes), name="one_hot_context")
    return graph.create_node("call_method", "to", (node, program.boundaries[0].specs[0].dtype), name="features")


def placeholders(graph: fx.Graph, *names: str | None) -> tuple[fx.Node, ...]:
    """Return the inputs of a graph that bear one of the names, in the graph's order."""
    return tuple(node for node in graph.nodes if node.op == "placeholder" and node.name in names)


@dataclass(frozen=True)
class GraphWriter:
    """Writes nodes into a fused graph.

    Attributes:
        program: The program.
        graph: The graph, changed in place.
        mean: Whether the loss averages over examples.
    """

    program: Program
    graph: fx.Graph
    mean: bool

    def function(self, target: Callable[..., Any], *args: Any, name: str | None = None, **options: Any) -> fx.Node:
        """Add a function call."""
        return self.graph.create_node("call_function", target, args, options, name)

    def detached(self, value: fx.Node, suffix: str = "detached") -> fx.Node:
        """Add the node of a detached value."""
        return self.graph.create_node("call_method", "detach", (value,), name=f"{value.name}_{suffix}")

    def items(self, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
        """Add the nodes that take a tuple apart."""
        return tuple(self.function(operator.getitem, node, index) for index in range(count))

    def estimate(self, key: str, origin: str, *given: Any) -> fx.Node:
        """Add the call of a boundary's estimator, and say where it comes from."""
        made = self.graph.create_node("call_module", self.path(key), given, name=f"estimate_{key}")
        made.meta["provenance"] = origin
        return made

    def path(self, key: str, name: str = "interfaces") -> str:
        """Return the path of a boundary's estimator, or of its input model, in the decoupled module."""
        return f"{interface_root(self.program.model, name)}.{key}"


@dataclass(frozen=True)
class FusedWriter(GraphWriter):
    """Writes interfaces into a fused graph.

    Attributes:
        examples: The node that counts the examples.
        features: The node of the context's features.
        target: The node of the target that suffixes compare their output with.
        errors: The boundaries whose estimators answer from the output's error, each with the nodes of its values.
        predictions: The nodes of the losses that estimators predict.
    """

    examples: fx.Node | int
    features: fx.Node | None
    target: fx.Node | None = None
    errors: list[tuple[Boundary, tuple[fx.Node, ...]]] = field(default_factory=list)
    predictions: list[fx.Node] = field(default_factory=list)

    def interface(self, boundary: Boundary, values: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Add one boundary's estimator and interface node; return what its consumers read."""
        interface, count = self.program.interfaces[boundary.index], len(values)
        if interface.locked and not interface.blends and not interface.late:
            return values
        for message in self.program.messages:
            if message.boundary.index == boundary.index:
                return self.message(message, values)
        if interface.scheduled_only(windows=bool(self.program.recurrences)):
            return self.items(self.function(scheduled_alone, values, boundary.name), count)
        if interface.suffix:
            return self.suffix(boundary, values)
        if interface.needs_error:
            self.errors.append((boundary, values))
            return tuple(self.detached(value, "crossing") for value in values)
        seen = self.masked(tuple(self.seen(value, interface) for value in values))
        asked = (seen, self.features, *(self.mask if interface.needs_mask else ()))
        estimates = self.estimate(boundary.key, provenance(boundary, interface), *asked)
        given: tuple[Any, ...] = (values, self.masked(self.items(estimates, count)), self.examples, self.mean)
        given += (interface.mix,) if interface.mix else ()
        if interface.needs_loss:
            self.predictions.append(self.function(operator.getitem, estimates, count))
        named: dict[str, Any] = {"boundary": boundary.name, **fitted(interface)}
        if interface.input_model is not None:
            named["imagined"] = self.masked(self.items(self.imagine(boundary), count))
        return self.crossing(self.function(swap_gradients, *given, name=f"swap_{boundary.key}", **named), values)

    def suffix(self, boundary: Boundary, values: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Add a thin suffix, which sees the target and some values beside those of the boundary, and its interface node."""
        interface, copies = self.program.interfaces[boundary.index], self.copies
        reads = tuple(
            self.detached(copies[name]) if self.program.measures[name].requires_grad else copies[name]
            for name in interface.reads
        )
        asked = (tuple(map(self.detached, values)), (self.target, self.examples, *reads))
        estimates = self.estimate(boundary.key, provenance(boundary, interface), *asked)
        given = (values, self.items(estimates, len(values)), self.examples, self.mean)
        named = {"boundary": boundary.name, **fitted(interface)}
        return self.crossing(self.function(swap_gradients, *given, name=f"swap_{boundary.key}", **named), values)

    @property
    def copies(self) -> dict[str, fx.Node]:
        """The copies of captured nodes, by the names of these."""
        return {node.meta[SOURCE]: node for node in self.graph.nodes if SOURCE in node.meta}

    def message(self, message: Message, values: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Add the estimator of messages, which sees all messages of all examples one by one, and its interface node."""
        boundary, interface = message.boundary, self.program.interfaces[message.boundary.index]
        seen = tuple(self.graph.call_method("flatten", (self.seen(value, interface), 0, 1)) for value in values)
        estimates = self.estimate(boundary.key, provenance(boundary, interface), seen, None)
        given = (values, self.items(estimates, len(values)), self.examples, self.mean, message.scale)
        named = {"boundary": boundary.name, **fitted(interface)}
        swapped = self.function(swap_messages, *given, name=f"swap_{boundary.key}", **named)
        return self.crossing(swapped, values)

    def crossing(self, swapped: fx.Node, values: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Add the nodes of what crosses in place of some values."""
        return tuple(
            self.function(operator.getitem, swapped, index, name=f"{value.name}_crossing")
            for index, value in enumerate(values)
        )

    def end(self, outputs: Any) -> Any:
        """Return what the graph returns: the outputs, which pass the node of the error, and any predictions of the loss."""
        if self.errors:
            estimators = tuple(self.graph.get_attr(self.path(boundary.key)) for boundary, _ in self.errors)
            for node, (boundary, _) in zip(estimators, self.errors, strict=True):
                node.meta["provenance"] = provenance(boundary, self.program.interfaces[boundary.index])
            values = tuple(values for _, values in self.errors)
            given = (outputs[0], values, estimators, self.examples, self.mean, *self.mask)
            outputs = (
                self.function(feed_back, *given, boundary=", ".join(boundary.name for boundary, _ in self.errors)),
            )
        return (outputs, tuple(self.predictions)) if self.predictions else outputs

    def seen(self, value: fx.Node, interface: Interface) -> fx.Node:
        """Add the node of a value as the estimator sees it: detached, unless the estimator's own loss flows back."""
        if not interface.prop:
            return self.detached(value)
        given = (value, interface.prop * (1 - interface.mix), self.examples, self.mean)
        return self.function(leak_gradient, *given, name=f"{value.name}_leaking")

    @property
    def mask(self) -> tuple[fx.Node, ...]:
        """The node of the mask, where there is one."""
        return placeholders(self.graph, self.program.mask)

    def masked(self, tensors: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Add the nodes that leave out tokens that do not count, where there is a mask."""
        for mask in self.mask:
            tensors = tuple(self.function(count_only, each, mask) for each in tensors)
        return tensors

    def imagine(self, boundary: Boundary) -> fx.Node:
        """Add the call of a boundary's input model on the model's own inputs."""
        inputs = self.masked(placeholders(self.graph, *data_inputs(self.program)))
        path, given = self.path(boundary.key, INPUT_MODELS), (inputs, self.features)
        return self.graph.create_node("call_module", path, given, name=f"imagine_{boundary.key}")


def fitted(interface: Interface) -> dict[str, Any]:
    """Return the options of an interface node that say what the estimates receive, where that is no squared error."""
    plain = interface.fit == "squared"
    return {} if plain else {"fit": interface.fit, "fit_weight": interface.fit_weight}


def provenance(boundary: Boundary, interface: Interface) -> str:
    """Say where an interface comes from, as a comment in emitted code."""
    count = count_parameters(interface.estimator)
    return f"cut after {boundary.name}; estimator {interface.description}, {count:,} parameters"
