"""The graphs of one part of a net, captured for each input kind that it meets."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dnifx.errors import DnifxError, DnifxWarning, InputKindWarning, PassError, StateError
from dnifx.ir import Part, Program
from dnifx.runtime.net.attach import attach
from dnifx.runtime.net.input_kinds import InputKind, hold_constants, listed_changes, what_is_read
from dnifx.runtime.net.kept_attributes import KeptAttributes
from dnifx.runtime.net.model_states import with_example_states
from dnifx.runtime.net.undo import RandomStates

Recompile = Callable[[Program, tuple[Any, ...], Mapping[str, Any], int], Program]
MOST_INPUT_KINDS = 16
"""How many kinds of inputs one part holds. Beyond that the one that was not used for longest makes room."""


def as_it_is() -> AbstractContextManager[Callable[[Any], Any]]:
    """Leave the model and all values where they are."""
    return nullcontext(lambda values: values)


def nothing() -> None:
    """Do nothing."""


class CapturedPart:
    """One part of a net with its graphs, which run on the net's own modules.

    Args:
        part: What the part is.
        program: Its program.
        net: The module that holds parameters, buffers, children and estimators.
        mean: Whether gradients are means over examples (else sums).
        recompile: Compiles the program again for another input kind: (program, args, kwargs, its number) to a program.

    Attributes:
        input_kinds: What is captured: the example's kind first, the others by their last use.
        captures: How many kinds were captured so far.
        attributes: What the model keeps in attributes from call to call.
        warned: Whether a warning said that an outcome of a draw cannot be cut.
        whole: Brings the model to one device, and gives what brings values there; a trainer over several devices sets it.
    """

    def __init__(self, part: Part, program: Program, net: nn.Module, mean: bool, recompile: Recompile) -> None:
        self.part, self.program, self.net, self.mean, self.recompile = part, program, net, mean, recompile
        self.input_kinds: list[InputKind] = []
        self.captures = 0
        self.attributes = KeptAttributes(program.model)
        self.warned = False
        self.whole: Callable[[], AbstractContextManager[Callable[[Any], Any]]] = as_it_is
        self._children = [
            (module._modules, name, child)
            for module in program.model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
            for name, child in module._modules.items()
        ]
        self._frozen = [(name, each) for name, each in program.model.named_parameters() if not each.requires_grad]

    def capture(self, program: Program) -> InputKind:
        """Attach a program's graphs to the net, as one more input kind."""
        if program.fused is None or program.signature is None:
            raise PassError("the program was not emitted; run all passes first")
        hold_constants(self.net, program.constants)
        with with_example_states(program):
            key = program.signature.key(program.args, program.kwargs)
        made = InputKind(
            program,
            program.signature,
            key,
            attach(program.fused, self.net, f"Fused{type(program.model).__name__}"),
            tuple(
                attach(graph, self.net, partition.name)
                for graph, partition in zip(program.submodules, program.partitions, strict=True)
            ),
            self.captures,
        )
        self.captures += 1
        self.attributes.note(program.signature)
        self.input_kinds.append(made)
        return made

    def refuse_other_modules(self) -> None:
        """Raise StateError where modules were replaced or parameters unfrozen since the model was decoupled."""
        replaced = [name for registry, name, child in self._children if registry.get(name) is not child]
        unfrozen = [name for name, parameter in self._frozen if parameter.requires_grad]
        if replaced or unfrozen:
            what = (
                f"the module {replaced[0]!r} was replaced"
                if replaced
                else f"the parameter {unfrozen[0]!r} was unfrozen"
            )
            raise StateError(
                f"{what} after dnifx.decouple, but the graphs and the optimizers are made for what was there. Decouple the model again "
                "as it is now, and make a new trainer or optimizer"
            )

    def make_room(self) -> None:
        """Drop the input kind that was not used for longest where there are too many; the first time, say what changes."""
        if len(self.input_kinds) < MOST_INPUT_KINDS:
            return
        if self.captures == MOST_INPUT_KINDS:
            model = type(self.program.model).__name__
            changing = listed_changes(self.input_kinds)
            warnings.warn(
                f"{model} has met {MOST_INPUT_KINDS} kinds of inputs; each structure, fixed value and mode is captured by itself, which "
                f"takes time, and from now on the kinds that were not used for longest are dropped. What changes: {changing}. Pass it "
                f"as a tensor, or keep it the same{what_is_read(self.input_kinds)}",
                InputKindWarning,
                stacklevel=2,
            )
        del self.input_kinds[1]

    def matching(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], before_capture: Callable[[], None] = nothing
    ) -> Iterator[InputKind]:
        """Yield the input kinds that a call may run in; the last one is compiled for this very call.

        Where draws decide what the model does, there may be no last one: what is drawn next leaves nothing to cut.

        Raises:
            InputError: The cuts cannot be found again in a new one.
        """
        self.refuse_other_modules()
        met = False
        for input_kind in tuple(self.input_kinds):
            if input_kind.signature.key(args, kwargs) == input_kind.key:
                if input_kind is not self.input_kinds[0] and input_kind is not self.input_kinds[-1]:
                    self.input_kinds.remove(input_kind)
                    self.input_kinds.append(input_kind)
                met = True
                yield input_kind
        self.make_room()
        before_capture()
        before = RandomStates(self.program.model)
        try:
            with self.whole() as brought:
                args, kwargs = brought((args, kwargs))
                program = self.recompile(self.program, args, kwargs, self.captures)
        except DnifxError as error:
            if not (met and self.steered):
                raise
            self.warn_of_outcome(error)
            return
        finally:
            before.restore()
        yield self.capture(program)

    def knows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a graph holds for a call, as is known without running anything."""
        for each in self.input_kinds:
            if each.signature.key(args, kwargs) == each.key:
                inputs = each.signature.flatten(args, kwargs)
                if each.numbers_hold(inputs):
                    return each.known(inputs)
        return False

    @property
    def steered(self) -> tuple[str, ...]:
        """The lines at which a draw decides what the model does."""
        capture = self.program.capture
        return () if capture is None else capture.steered

    def warn_of_outcome(self, error: DnifxError) -> None:
        """Warn, once, that an outcome of a draw cannot be cut as the others are."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{type(self.program.model).__name__} draws at {self.steered[0]!r}, and one outcome cannot be cut as the others are. "
                "Its steps run the model itself, by backpropagation, and the estimators learn nothing from them: "
                + str(error).splitlines()[0],
                DnifxWarning,
                stacklevel=4,
            )
