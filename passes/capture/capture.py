"""Capture: from a module to a graph over the module's own paths."""

from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

from torch import fx, nn

from dnifx.errors import CaptureError, InputError, PassError
from dnifx.ir import Capture, Program
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.methods import try_methods, with_constant_paths
from dnifx.passes.capture.record.generators import seeded
from dnifx.passes.capture.refusals import ModelFails
from dnifx.passes.graph import captured, output_of
from dnifx.passes.pipeline import Pass


@dataclass(frozen=True)
class CaptureGraph(Pass):
    """Capture the model by the first method whose graph does what the model does.

    Attributes:
        methods: The methods in the order in which they are tried. ``record`` records the model with all modules opened;
            ``record_cuts`` opens only the modules around the cuts; ``export`` uses torch.export; ``symbolic`` uses torch.fx.
        verify: Compare the outputs, gradients, buffers and random state of each method's graph with the model's, at another
            batch size too, before it is taken.
        open_paths: The modules to open for ``record_cuts``; without them that method is skipped.
        keep_whole: Modules that recording keeps as one node in any case.
        input_kind: Number of this capture among those of one decoupled module; it keeps their constants apart.
        varying: Attributes whose numbers become inputs, since they change from call to call: ``self.gate.alpha``.
        outcomes: Under how many seeds to capture where a draw decides what the model does. The outcome that computes most is
            taken, so that it is not luck which modules the first input kind has. 0 takes the present random state.
    """

    methods: tuple[str, ...] = ("record", "record_cuts", "export", "symbolic")
    verify: bool = True
    open_paths: tuple[str, ...] | None = None
    keep_whole: tuple[str, ...] = ()
    input_kind: int = 0
    varying: tuple[str, ...] = ()
    outcomes: int = 0
    name: ClassVar[str] = "capture"
    requires: ClassVar[tuple[str, ...]] = ("model",)
    ensures: ClassVar[tuple[str, ...]] = ("graph", "signature", "capture")

    def run(self, program: Program) -> Program:
        """Try the methods in order.

        Raises:
            CaptureError: No method captures the model; the text says what was wrong with each.
        """
        refuse_names_without_a_path(program.model)
        found, capture = self.found(program)
        if capture.steered and self.outcomes:
            found, capture = self.fullest(program)
        found = with_constant_paths(found, self.input_kind)
        notes = [f"{kept.path} is kept whole, as one node: {kept.reason}" for kept in found.kept]
        notes += [
            f"a draw decides what the model does, and each outcome is captured by itself: {at}" for at in found.steered
        ]
        return replace(
            program,
            graph=with_own_reads(without_dead_reads(found.graph)),
            signature=found.signature,
            constants=found.constants,
            capture=capture,
            notes=(*program.notes, *notes, *found.notes),
        )

    def found(self, program: Program, verify: bool = True) -> tuple[CapturedGraph, Capture]:
        """Try the methods in the present random state.

        Raises:
            CaptureError: No method captures the model, or it fails on the example inputs.
            InputError: It fails on the inputs of a later call.
        """
        try:
            return try_methods(
                program, self.methods, self.open_paths, self.verify and verify, self.keep_whole, self.varying
            )
        except ModelFails as error:
            told = InputError(error.later) if self.input_kind else CaptureError(str(error))
            raise told from error.__cause__

    def fullest(self, program: Program) -> tuple[CapturedGraph, Capture]:
        """Capture under several seeds, and take the outcome of the draws in which the model computes most."""
        sizes = {}
        for number in range(self.outcomes):
            with seeded(number):
                sizes[number] = len(self.found(program, verify=False)[0].graph.nodes)
        best = max(sizes, key=lambda number: sizes[number])
        with seeded(best):
            found, capture = self.found(program)
        return found, replace(capture, seed=best)

    def check(self, program: Program) -> None:
        """The graph is well formed and returns a flat tuple."""
        graph = captured(program)
        graph.lint()
        if not isinstance(output_of(graph).args[0], tuple):
            raise PassError("capture gave a graph whose output is not a flat tuple")


def refuse_names_without_a_path(model: nn.Module) -> None:
    """Raise CaptureError where a module holds something under a name that no path can lead to."""
    for module in model.modules():
        for name in chain(module._modules.keys(), module._parameters.keys(), module._buffers.keys()):
            if not isinstance(name, str) or not name or "." in name:
                raise CaptureError(
                    f"a {type(module).__name__} of {type(model).__name__} holds something under the name {name!r}, but paths of modules "
                    "and tensors are written with dots between names; give it a name that is not empty and has no dot"
                )


def without_dead_reads(graph: fx.Graph) -> fx.Graph:
    """Remove reads of parameters and buffers that nothing uses."""
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def with_own_reads(graph: fx.Graph) -> fx.Graph:
    """Give every user of a parameter, buffer or constant a read of its own, so that each partition holds its reads."""
    for node in graph.find_nodes(op="get_attr"):
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.node_copy(node))
    return graph
