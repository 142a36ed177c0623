"""The net as its trainer sees it: a model with an estimator on every cut, and its parts with their graphs."""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dnifx.errors import InputError
from dnifx.ir import Boundary, Partition, Program, Recurrence, Schedule
from dnifx.runtime.net.captured import CapturedPart, Recompile
from dnifx.runtime.net.input_kinds import InputKind, share_state
from dnifx.runtime.net.losses import Loss, PartLoss
from dnifx.runtime.net.model_states import with_example_states


@dataclass(frozen=True)
class Emitters:
    """What a decoupled module asks of the packages above it.

    Attributes:
        report: The program as text for people.
        rich: The program as a rich renderable.
        code: The program as Python; with whether the loss is a mean.
        folder: Writes a module as a package.
        step: The source of a training step, from a schedule, whether the loss is a mean, and whether to diagnose.
        probe: The source of a probe, from whether the loss is a mean and whether targets are the true gradients.
        schedule: From a schedule's specification and a lag to what gives each step its schedule.
    """

    report: Callable[[Program], str]
    rich: Callable[[Program], Any]
    code: Callable[[Program, bool], str]
    folder: Callable[["Net", str | os.PathLike[str], bool], None]
    step: Callable[[Program, Schedule, bool, bool], str]
    probe: Callable[[Program, bool, bool], str]
    schedule: Callable[[Any, Program, int], Any]


class Net(nn.Module):
    """A model with a Decoupled Neural Interface on every cut; ``DecoupledModule`` adds how it is called.

    It holds the model's own children, parameters and buffers under their own names, and the estimators beside them.

    Args:
        program: A program that went through all passes.
        losses: By part, what its outputs are compared by.
        mean: Whether gradients are means over examples (else sums) in parts without a loss.
        roots: The attributes that hold the estimators and the input models.
        emitters: What is asked of the packages above.
        recompile: Compiles the model again for another input kind: (program, args, kwargs, its number) to a program.

    Attributes:
        original: The user's model.
        program: All partitions and boundaries, as reports and schedules number them.
        parts: What fires together; one part where the net has no rates.
        whole: The fused program. It is the part itself where there is one.
        recurrences: The boundaries in time of all parts.
        imagines: Whether there are synthetic input models.
        uncut: The keys of calls that run without interfaces in evaluation mode.
    """

    def __init__(
        self,
        program: Program,
        losses: Mapping[int, PartLoss],
        mean: bool,
        roots: tuple[str, str],
        emitters: Emitters,
        recompile: Recompile,
    ) -> None:
        super().__init__()
        share_state(self, program.model)
        self.__dict__.update(original=program.model, program=program, mean=mean, losses=dict(losses), emitters=emitters)
        self.__dict__.update(recurrences=tuple(each for _, own in program.fired() for each in own.recurrences))
        estimators: dict[str, nn.Module] = {}
        imagined: dict[str, nn.Module] = {}
        for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
            estimators[boundary.key] = interface.estimator
            if interface.input_model is not None:
                imagined[boundary.key] = interface.input_model
        estimators.update((each.key, each.interface.estimator) for each in self.recurrences if each.interface)
        estimators.update((f"{each.key}_head", each.head) for each in self.recurrences if each.head is not None)
        self.add_module(roots[0], nn.ModuleDict(estimators))
        if imagined:
            self.add_module(roots[1], nn.ModuleDict(imagined))
        parts = []
        for part, own in program.fired():
            its_mean = losses[part.index].mean if part.index in losses else mean
            again = refuse_other_inputs if program.parts else recompile
            parts.append(CapturedPart(part, own, self, its_mean, again))
            parts[-1].capture(own)
        whole = CapturedPart(parts[0].part, program, self, mean, recompile) if program.parts else parts[0]
        self.__dict__.update(parts=tuple(parts), whole=whole, imagines=bool(imagined), uncut=set())

    original: nn.Module
    program: Program
    losses: dict[int, PartLoss]
    mean: bool
    emitters: Emitters
    parts: tuple[CapturedPart, ...]
    whole: CapturedPart
    imagines: bool
    uncut: set[Hashable]
    recurrences: tuple[Recurrence, ...]

    @property
    def loss(self) -> Loss | None:
        """The loss, where there is one for the whole output."""
        return next((each.function for each in self.losses.values() if each.name is None), None)

    @property
    def input_kinds(self) -> list[InputKind]:
        """What was captured so far of the fused program, one for each input kind."""
        return self.whole.input_kinds

    @property
    def fused(self) -> fx.GraphModule:
        """The fused graph of the example's input kind."""
        with with_example_states(self.program):
            return next(self.whole.matching(self.program.args, self.program.kwargs)).fused

    @property
    def submodules(self) -> tuple[fx.GraphModule, ...]:
        """The partitions' graphs of the example's input kind."""
        return self.input_kinds[0].submodules

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The partitions, in order."""
        return self.program.partitions

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """The boundaries, in the order of their producers."""
        return self.program.boundaries

    def interface_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of estimators and input models."""
        in_time = (each.interface for each in self.recurrences if each.interface is not None)
        for interface in (*self.program.interfaces, *in_time):
            yield from interface.estimator.parameters()
            if interface.input_model is not None:
                yield from interface.input_model.parameters()


def refuse_other_inputs(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Program:
    """Raise InputError: one of several parts holds for the inputs and modes that it was captured for."""
    shapes = ", ".join(str(tuple(value.shape)) for value in args[0] if isinstance(value, Tensor))
    raise InputError(
        f"a part of the net was captured for other inputs or another mode (it now takes {shapes}). Decouple the model again, with an "
        "example of this call and in this mode"
    )
