"""Windows in the fused graph: the nodes at the start and at the end of a recurrent model's window."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from dnifx.errors import CutError, PassError
from dnifx.ir import Program, Recurrence, constants_root
from dnifx.passes.emit.fused import EXAMPLES, SOURCE, GraphWriter, fitted, own_input
from dnifx.passes.graph import copied, flat_output, output_of
from dnifx.passes.pipeline import Pass
from dnifx.passes.time.recurrences import described
from dnifx.passes.time.states import state_positions
from dnifx.runtime.emitted.exact import end_traced, start_traced
from dnifx.runtime.emitted.windows import by_example, end_window, start_window, without_rows

RESET = "reset"
"""Name of the input that says which examples begin an episode."""


@dataclass(frozen=True)
class EmitWindows(Pass):
    """Put the two nodes of every boundary in time into the fused graph.

    Attributes:
        mean: Whether the loss averages over examples (else it sums).
        input_kind: Number of this input kind; it keeps what its graph reads apart.
    """

    mean: bool = True
    input_kind: int = 0
    name: ClassVar[str] = "windows"
    requires: ClassVar[tuple[str, ...]] = ("fused", "recurrences")
    ensures: ClassVar[tuple[str, ...]] = ("fused",)

    def run(self, program: Program) -> Program:
        """Write the graph.

        Raises:
            CutError: The model returns nothing but its state.
        """
        if program.fused is None:
            raise PassError("the program was not emitted; run emit first")
        graph = copied(program.fused)
        writer = WindowWriter(program, graph, self.mean, self.input_kind)
        writer.start()
        writer.end()
        rules = {
            rule_path(program, each, self.input_kind): each.exact
            for each in program.recurrences
            if each.exact is not None
        }
        return replace(program, fused=graph, constants={**program.constants, **rules})

    def check(self, program: Program) -> None:
        """The graph is well formed."""
        if program.fused is not None:
            program.fused.lint()


@dataclass(frozen=True)
class WindowWriter(GraphWriter):
    """Writes both ends of a window into a fused graph.

    Attributes:
        input_kind: Number of this input kind.
    """

    input_kind: int = 0

    @property
    def nodes(self) -> Mapping[str, fx.Node]:
        """The copies of captured nodes, by the names of these."""
        return {node.meta[SOURCE]: node for node in self.graph.nodes if SOURCE in node.meta}

    @property
    def examples(self) -> fx.Node:
        """The node that counts the examples."""
        found: fx.Node = next(node for node in self.graph.nodes if EXAMPLES in node.meta)
        return found

    def start(self) -> None:
        """Detach the states, zero the rows to reset, and let what arrives fit the estimators."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_after(placeholders[-1]):
            reset = own_input(self.graph, RESET)
        with self.graph.inserting_before(self.examples.next):
            fitted: set[str] = set()
            for each in self.program.recurrences:
                if each.exact is not None:
                    self.start_traced(each, reset)
                    fitted |= set(each.inputs)
                elif each.interface is not None and (each.interface.fits or each.interface.mix):
                    self.start_boundary(each, reset)
                    fitted |= set(each.inputs)
            attached = {name for each in self.program.recurrences if waits(each) for name in each.inputs}
            for carry in self.program.carries:
                if carry.input not in fitted:
                    state = self.nodes[carry.input]
                    value = state if carry.input in attached else self.detached(state)
                    self.take_place(state, self.function(without_rows, value, reset, carry.dim), {value})

    def start_boundary(self, each: Recurrence, reset: fx.Node) -> None:
        """Write the node at the start of one boundary's window."""
        states = tuple(self.nodes[name] for name in each.inputs)
        left = tuple(map(self.detached, states))
        given = (states if waits(each) else left, self.estimates(each, left), reset, each.dims)
        back = (mix_of(each) * each.cut.scale,) if waits(each) else ()
        given = (*given, self.examples, self.mean, *back)
        options = fitted(each.interface) if each.interface is not None else {}
        started = self.function(start_window, *given, name=f"start_{each.key}", boundary=each.name, **options)
        for index, state in enumerate(states):
            self.take_place(state, self.function(operator.getitem, started, index), {*left, started})

    def start_traced(self, each: Recurrence, reset: fx.Node) -> None:
        """Write the node at the start of a window whose gradient is exact: it takes the state and its trace."""
        states = tuple(self.nodes[name] for name in each.inputs)
        begun = self.function(start_traced, self.rule(each), states, reset, name=f"start_{each.key}")
        for index, state in enumerate(states):
            self.take_place(state, self.function(operator.getitem, begun, index), {begun})

    def rule(self, each: Recurrence) -> fx.Node:
        """Write the read of the rule of a boundary's trace."""
        return self.graph.get_attr(rule_path(self.program, each, self.input_kind))

    def end_traced(self, each: Recurrence, flat: list[fx.Node], alone: frozenset[int]) -> list[fx.Node]:
        """Write the node at the end of a window whose gradient is exact; return the flat outputs with the state that it leaves."""
        self.beside(each, flat, alone)
        begun = next(node for node in self.graph.nodes if node.name == f"start_{each.key}")
        *states, trace = self.items(begun, len(each.inputs) + 1)
        reads = tuple(self.nodes[name] for name in each.exact.reads)
        left = tuple(self.nodes[name] for name in each.values)
        places = [place for place, node in enumerate(flat) if source_of(node) in each.values]
        given = (self.rule(each), trace, tuple(states), reads, left, not alone.issuperset(places))
        ended = self.function(end_traced, *given, name=f"end_{each.key}")
        seen = dict(zip(each.values, self.items(ended, len(left)), strict=True))
        return [seen[source_of(node)] if place in places else node for place, node in enumerate(flat)]

    def take_place(self, state: fx.Node, value: fx.Node, own: set[fx.Node]) -> None:
        """Let all that read a state read what the window starts from."""
        own = own | {self.examples, value}
        state.replace_all_uses_with(value, delete_user_cb=lambda user: user not in own)

    def end(self) -> None:
        """Give the states that the window leaves their synthetic gradients, when the outputs are differentiated."""
        alone, output, flat = state_positions(self.program), output_of(self.graph), list(flat_output(self.graph))
        with self.graph.inserting_before(output):
            traced = [each for each in self.program.recurrences if each.exact is not None]
            tied = {name for each in traced for name in each.values}
            free = [position for position in alone if source_of(flat[position]) not in tied]
            for each in traced:
                flat = self.end_traced(each, flat, alone)
            for each in self.program.recurrences:
                if each not in traced and (not waits(each) or mix_of(each)):
                    flat = self.end_boundary(each, flat, alone)
            attached = {name for each in self.program.recurrences if waits(each) for name in each.values}
            for position in free:
                if flat[position].meta.get(SOURCE) not in attached:
                    flat[position] = self.detached(flat[position])
        output.args = (tuple(flat),)

    def end_boundary(self, each: Recurrence, flat: list[fx.Node], alone: frozenset[int]) -> list[fx.Node]:
        """Write the node at the end of one boundary's window; return the flat outputs behind it."""
        outputs = self.beside(each, flat, alone)
        values = tuple(self.nodes[name] for name in each.values)
        estimates = self.estimates(each, tuple(map(self.detached, values)))
        given = (outputs, values, estimates, each.dims, each.cut.scale, self.examples, self.mean)
        ended = self.function(end_window, *given, name=f"end_{each.key}", boundary=each.name)
        seen = dict(zip(outputs, self.items(ended, len(outputs)), strict=True))
        return [node if place in alone else seen.get(node, node) for place, node in enumerate(flat)]

    def beside(self, each: Recurrence, flat: list[fx.Node], alone: frozenset[int]) -> tuple[fx.Node, ...]:
        """Return the outputs with a gradient that are no state.

        Raises:
            CutError: There are none.
        """
        outputs = tuple(
            dict.fromkeys(node for place, node in enumerate(flat) if place not in alone and self.differentiable(node))
        )
        if not outputs:
            raise CutError(
                f"{each.cut!r}: the model returns nothing but its state, so no loss can be computed from its output; return "
                "the output beside the state"
            )
        return outputs

    def differentiable(self, node: object) -> bool:
        """Whether an output is a tensor that carries a gradient."""
        if not isinstance(node, fx.Node):
            return False
        if node.target is operator.getitem and node.args[0].target is end_window:  # type: ignore[union-attr]
            return True
        measure = self.program.measures.get(node.meta.get(SOURCE, ""))
        return measure is not None and measure.is_tensor and measure.requires_grad

    def estimates(self, each: Recurrence, values: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Write the estimator's answer to detached values of the state."""
        seen = tuple(self.function(by_example, *pair) for pair in zip(values, each.dims, strict=True))
        return self.items(self.estimate(each.key, described(each), seen, None), len(values))


def source_of(node: object) -> str:
    """Return the name of the captured node that a node of the fused graph copies; empty where it copies none."""
    return str(node.meta.get(SOURCE, "")) if isinstance(node, fx.Node) else ""


def rule_path(program: Program, each: Recurrence, number: int) -> str:
    """Return the path at which the fused graph finds the rule of a boundary's trace."""
    return f"{constants_root(program.model)}.rule{number}_{each.key}"


def waits(each: Recurrence) -> bool:
    """Whether windows wait for the gradients of later ones, so that states stay attached."""
    return each.interface is not None and each.interface.locked


def mix_of(each: Recurrence) -> float:
    """Return the share of the later window's gradient in what a window receives; the rest is the estimate."""
    return each.interface.mix if each.interface is not None else 0.0
