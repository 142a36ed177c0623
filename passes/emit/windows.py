"""Windows in the fused graph: what stands at the start and at the end of a window of a recurrent model."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from dnifx.errors import CutError, PassError
from dnifx.ir import Program, Recurrence
from dnifx.passes.emit.fused import interface_root
from dnifx.passes.graph import copied, flat_output, output_of
from dnifx.passes.pipeline import Pass
from dnifx.passes.time.recurrences import described, state_positions
from dnifx.runtime.emitted.windows import by_example, end_window, start_window, window_weight, without_rows

RESET = "reset"
"""Name of the input that says which examples begin an episode."""


@dataclass(frozen=True)
class EmitWindows(Pass):
    """Put the two nodes of every cut in time into the fused graph.

    Attributes:
        mean: Whether the loss averages over examples (else it sums).
    """

    mean: bool = True
    name: ClassVar[str] = "windows"
    requires: ClassVar[tuple[str, ...]] = ("fused", "recurrences")
    ensures: ClassVar[tuple[str, ...]] = ("fused",)

    def run(self, program: Program) -> Program:
        """Write the graph.

        Raises:
            CutError: An input of the model is called ``reset``, or the model returns nothing but its state.
        """
        if program.fused is None:
            raise PassError("the program was not emitted; run emit first")
        if program.signature is not None and RESET in program.signature.inputs:
            raise CutError(
                f"the model has an input {RESET!r}, which is what decoupled modules call the rows to reset; rename it"
            )
        graph = copied(program.fused)
        writer = WindowWriter(program, graph, self.mean)
        writer.start()
        writer.end()
        return replace(program, fused=graph)

    def check(self, program: Program) -> None:
        """The graph is well formed."""
        if program.fused is not None:
            program.fused.lint()


@dataclass(frozen=True)
class WindowWriter:
    """Writes into a fused graph.

    Attributes:
        program: The program.
        graph: The graph, changed in place.
        mean: Whether the loss averages over examples.
    """

    program: Program
    graph: fx.Graph
    mean: bool

    @property
    def nodes(self) -> Mapping[str, fx.Node]:
        """The graph's nodes by name."""
        return {node.name: node for node in self.graph.nodes}

    def start(self) -> None:
        """Detach the states, zero the rows to reset, and let what arrives fit the estimators."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_after(placeholders[-1]):
            reset = self.graph.create_node("placeholder", RESET, (None,), {}, name=RESET)
        with self.graph.inserting_before(self.nodes["examples"].next):
            fitted: set[str] = set()
            for each in self.program.recurrences:
                if each.interface is not None and (each.interface.fits or each.interface.mix):
                    self.start_boundary(each, reset)
                    fitted |= set(each.inputs)
            kept = {name for each in self.program.recurrences if joined(each) for name in each.inputs}
            for carry in self.program.carries:
                if carry.input not in fitted:
                    state = self.nodes[carry.input]
                    value = state if carry.input in kept else self.call("detach", state)
                    self.take_place(state, self.function(without_rows, value, reset, carry.dim), {value})

    def start_boundary(self, each: Recurrence, reset: fx.Node) -> None:
        """Write the node at the start of one boundary's window."""
        states = [self.nodes[name] for name in each.inputs]
        left = tuple(self.call("detach", state) for state in states)
        given = [tuple(states) if joined(each) else left, self.estimates(each, left), reset, each.dims]
        back = (mix_of(each) * each.cut.scale,) if joined(each) else ()
        started = self.function(
            start_window, *given, self.nodes["examples"], self.mean, *back, name=f"start_{each.key}"
        )
        for index, state in enumerate(states):
            self.take_place(state, self.function(operator.getitem, started, index), {*left, started})

    def take_place(self, state: fx.Node, value: fx.Node, own: set[fx.Node]) -> None:
        """Let all that read a state read what the window starts from."""
        own = own | {self.nodes["examples"], value}
        state.replace_all_uses_with(value, delete_user_cb=lambda user: user not in own)

    def end(self) -> None:
        """Give the states that the window leaves their synthetic gradients, when the outputs are differentiated."""
        alone, output, flat = state_positions(self.program), output_of(self.graph), list(flat_output(self.graph))
        with self.graph.inserting_before(output):
            for each in self.program.recurrences:
                if not joined(each) or mix_of(each):
                    flat = self.end_boundary(each, flat, alone)
            held = {name for each in self.program.recurrences if joined(each) for name in each.values}
            for position in alone:
                if flat[position].name not in held:
                    flat[position] = self.call("detach", flat[position])
        output.args = (tuple(flat),)

    def end_boundary(self, each: Recurrence, flat: list[fx.Node], alone: frozenset[int]) -> list[fx.Node]:
        """Write the node at the end of one boundary's window; return the flat outputs behind it."""
        outputs = tuple(
            dict.fromkeys(node for place, node in enumerate(flat) if place not in alone and self.differentiable(node))
        )
        if not outputs:
            raise CutError(
                f"{each.cut!r}: the model returns nothing but its state, so that no loss can be taken from its output; return "
                "the output beside the state"
            )
        values = tuple(self.nodes[name] for name in each.values)
        estimates = self.estimates(each, tuple(self.call("detach", value) for value in values))
        weight = self.function(window_weight, each.cut.scale, self.nodes["examples"], self.mean)
        ended = self.function(end_window, outputs, values, estimates, each.dims, weight, name=f"end_{each.key}")
        seen = {node: self.function(operator.getitem, ended, index) for index, node in enumerate(outputs)}
        return [node if place in alone else seen.get(node, node) for place, node in enumerate(flat)]

    def differentiable(self, node: object) -> bool:
        """Whether an output is a tensor that carries a gradient."""
        if not isinstance(node, fx.Node):
            return False
        if node.target is operator.getitem and node.args[0].target is end_window:  # type: ignore[union-attr]
            return True
        measure = self.program.measures.get(node.name)
        return measure is not None and measure.is_tensor and measure.requires_grad

    def estimates(self, each: Recurrence, values: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Write the estimator's answer to detached values of the state."""
        seen = tuple(
            self.function(by_example, value, carry.dim) for value, carry in zip(values, each.carries, strict=True)
        )
        target = f"{interface_root(self.program.model)}.{each.key}"
        made = self.graph.create_node("call_module", target, (seen, None), name=f"estimate_{each.key}")
        made.meta["provenance"] = described(each)
        return tuple(self.function(operator.getitem, made, index) for index in range(len(values)))

    def call(self, method: str, value: fx.Node) -> fx.Node:
        """Write a method call."""
        return self.graph.create_node("call_method", method, (value,), name=f"{value.name}_{method}ed")

    def function(self, target: object, *args: object, name: str | None = None) -> fx.Node:
        """Write a function call."""
        return self.graph.create_node("call_function", target, args, name=name)  # type: ignore[arg-type]


def joined(each: Recurrence) -> bool:
    """Whether the windows before wait for the gradient of those behind, so that states stay attached."""
    return each.interface is not None and each.interface.locked


def mix_of(each: Recurrence) -> float:
    """Return the share of what arrives from the next window in what a window receives, where its estimate is used too."""
    return each.interface.mix if each.interface is not None else 0.0
