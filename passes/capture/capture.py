"""Capture: from a module to a graph over the module's own paths."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Capture, Program
from dnifx.passes.capture.methods import climb_ladder, named_apart
from dnifx.passes.pipeline import Pass


@dataclass(frozen=True)
class CaptureGraph(Pass):
    """Capture the model by the first rung of a ladder whose graph does what the model does.

    Attributes:
        rungs: Techniques in the order that they are tried (``RUNGS``): ``record``, everything opened; ``record_cuts``, only
            what the cuts need opened; ``export``; ``symbolic``.
        verify: Compare each rung's outputs, gradients, buffers and random state with the model's, at another batch size
            too, before it is taken.
        open_paths: The modules that the cuts need opened, where they are known; without them ``record_cuts`` is skipped.
        keep_whole: Modules that recording keeps whole in any case.
        situation: Number of this capture among those of one decoupled module; keeps their constants apart.
    """

    rungs: tuple[str, ...] = ("record", "record_cuts", "export", "symbolic")
    verify: bool = True
    open_paths: tuple[str, ...] | None = None
    keep_whole: tuple[str, ...] = ()
    situation: int = 0
    name: ClassVar[str] = "capture"
    requires: ClassVar[tuple[str, ...]] = ("model",)
    ensures: ClassVar[tuple[str, ...]] = ("graph", "signature", "capture")

    def run(self, program: Program) -> Program:
        """Climb the ladder.

        Raises:
            CaptureError: No rung captures the model as it is; the text says what each met.
        """
        climb = climb_ladder(program, self.rungs, self.open_paths, self.verify, self.keep_whole)
        rung, found = climb.rung, named_apart(climb.found, self.situation)
        notes = tuple(f"{kept.path} is kept whole, as one node: {kept.reason}" for kept in found.kept)
        return replace(
            program,
            graph=with_own_reads(without_dead_reads(found.graph)),
            signature=found.signature,
            constants=found.constants,
            capture=Capture(rung, found.kept, climb.verified, climb.tried, found.guards),
            notes=program.notes + notes + found.notes + climb.notes,
        )

    def check(self, program: Program) -> None:
        """The graph is well formed and returns a flat tuple."""
        graph = captured(program)
        graph.lint()
        if not isinstance(output_of(graph).args[0], tuple):
            raise PassError("capture gave a graph whose output is not a flat tuple")


def captured(program: Program) -> fx.Graph:
    """Return the program's graph."""
    if program.graph is None:
        raise PassError("the program has no graph yet; run capture first")
    return program.graph


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the output node of a graph."""
    output: fx.Node = next(iter(reversed(graph.nodes)))
    return output


def without_dead_reads(graph: fx.Graph) -> fx.Graph:
    """Remove reads of parameters and buffers that nothing uses."""
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def with_own_reads(graph: fx.Graph) -> fx.Graph:
    """Give every user of a parameter, buffer or constant a read of its own, so that each partition holds its reads."""
    for node in list(graph.nodes):
        if node.op == "get_attr":
            for user in list(node.users)[1:]:
                with graph.inserting_before(user):
                    user.replace_input_with(node, graph.node_copy(node))
    return graph


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
