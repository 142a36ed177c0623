"""Capture: from a module to a graph over the module's own paths."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from dnifx.errors import PassError
from dnifx.ir import Capture, Program
from dnifx.passes.capture.methods import named_apart, try_methods
from dnifx.passes.graph import captured, output_of
from dnifx.passes.pipeline import Pass


@dataclass(frozen=True)
class CaptureGraph(Pass):
    """Capture the model by the first method of a ladder whose graph does what the model does.

    Attributes:
        methods: Techniques in the order that they are tried (``METHODS``): ``record``, everything opened; ``record_cuts``, only
            what the cuts need opened; ``export``; ``symbolic``.
        verify: Compare each method's outputs, gradients, buffers and random state with the model's, at another batch size
            too, before it is taken.
        open_paths: The modules that the cuts need opened, where they are known; without them ``record_cuts`` is skipped.
        keep_whole: Modules that recording keeps whole in any case.
        input kind: Number of this capture among those of one decoupled module; keeps their constants apart.
    """

    methods: tuple[str, ...] = ("record", "record_cuts", "export", "symbolic")
    verify: bool = True
    open_paths: tuple[str, ...] | None = None
    keep_whole: tuple[str, ...] = ()
    input_kind: int = 0
    name: ClassVar[str] = "capture"
    requires: ClassVar[tuple[str, ...]] = ("model",)
    ensures: ClassVar[tuple[str, ...]] = ("graph", "signature", "capture")

    def run(self, program: Program) -> Program:
        """Climb the ladder.

        Raises:
            CaptureError: No method captures the model as it is; the text says what each met.
        """
        attempt = try_methods(program, self.methods, self.open_paths, self.verify, self.keep_whole)
        method, found = attempt.method, named_apart(attempt.found, self.input_kind)
        notes = tuple(f"{kept.path} is kept whole, as one node: {kept.reason}" for kept in found.kept)
        return replace(
            program,
            graph=with_own_reads(without_dead_reads(found.graph)),
            signature=found.signature,
            constants=found.constants,
            capture=Capture(method, found.kept, attempt.verified, attempt.tried, found.guards),
            notes=program.notes + notes + found.notes + attempt.notes,
        )

    def check(self, program: Program) -> None:
        """The graph is well formed and returns a flat tuple."""
        graph = captured(program)
        graph.lint()
        if not isinstance(output_of(graph).args[0], tuple):
            raise PassError("capture gave a graph whose output is not a flat tuple")


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
