"""Compiles a system whose parts fire at different rates: the parts, and what stands between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dnifx.errors import ContextError, CutError, LossError
from dnifx.ir import Boundary, Context, Part, Program, Recurrent
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.cuts.partition import FormPartitions
from dnifx.passes.cuts.resolve import CutSpec, ResolveCuts, modules_to_open
from dnifx.passes.emit.fused import EmitFused
from dnifx.passes.emit.loss_scale import EmitLossScale
from dnifx.passes.emit.split import SplitPartitions
from dnifx.passes.emit.windows import EmitWindows
from dnifx.passes.insert.interfaces import Choice, Choices, InsertInterfaces, assign
from dnifx.passes.legalize.legalize import Legalize
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import Callback, Pass, run_passes
from dnifx.passes.rates.fused import with_interfaces
from dnifx.passes.rates.messages import find_messages, message_interface
from dnifx.passes.rates.parts import joined, part_program
from dnifx.passes.rates.rated import BATCH, RatedProgram, end_to_end
from dnifx.passes.rates.rates import Rates, partitions_named, rates_of
from dnifx.passes.rates.refusals import refuse_attributes, refuse_end, refuse_fused, refuse_traces
from dnifx.passes.schedule import ScheduleActions
from dnifx.passes.time.recurrences import FormRecurrences, InsertRecurrences, as_boundary
from dnifx.passes.time.states import ResolveStates, SeparateStates


@dataclass(frozen=True)
class RateCompiler:
    """Compiles a system.

    Attributes:
        cuts: The cuts inside the system.
        recurrents: The cuts in time.
        every: How often partitions fire, by module path or partition name.
        gradient: The estimators.
        context: What the estimators between parts see beside the messages; those inside parts see none.
        verify: Compare what is captured with the system before it is taken.
        callback: Told of each pass.
    """

    cuts: CutSpec
    recurrents: tuple[Recurrent, ...]
    every: Rates
    gradient: Choices
    context: Context | None = None
    verify: bool = True
    callback: Callback | None = None

    def compile(self, given: Program) -> Program:
        """Capture the system once for each rate and take it apart.

        Raises:
            DnifxError: A child that says what cannot be done, where, and what to do instead.
        """
        whole = self.rated(given, 0)
        rated = {windows: self.longer(whole, windows) for windows in whole.windows}
        formed = [self.formed(*part_program(rated[windows], windows)) for windows in whole.windows]
        messages = find_messages(rated, formed)
        if self.context is not None and not messages:
            raise ContextError(
                f"context= ({self.context.description}) is seen by the estimators of messages between parts, and no part of "
                f"every={dict(self.every)!r} fires less often than another: leave context= out, or every="
            )
        choices = assign(self.gradient, (*boundaries_of(formed), *(each.boundary for each in messages)))
        programs = [self.finished(program, choices) for _, program in formed]
        own = [
            message_interface(each, choices[each.boundary.name], self.context, programs[each.source])
            for each in messages
        ]
        return joined(whole.program, [part for part, _ in formed], programs, messages, own, self.context)

    def fused(
        self, first: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int, mean: bool | None
    ) -> Program:
        """Compile the model for a call of any number of windows. One call is one firing of every part.

        Args:
            first: The compiled program, whose interfaces serve here too.
            args: Positional inputs of the call.
            kwargs: Keyword inputs.
            number: Number of this input kind among those of the fused program.
            mean: Whether losses average over examples; None where some do and others sum.

        Raises:
            DnifxError: The program has no fused form; the text says why.
        """
        refuse_fused(first, mean)
        captured = self.rated(Program(first.model, args, dict(kwargs)), number + 1 + first.parts[-1].every)
        program = with_interfaces(first, replace(captured.program, batch_dim=BATCH))
        states = tuple(each for own in first.programs for each in own.recurrences)
        in_time: tuple[Pass, ...] = (FormRecurrences(), InsertRecurrences("zero", states)) if self.recurrents else ()
        steps = (*in_time, SplitPartitions(), ScheduleActions(), EmitFused(bool(mean)))
        windows = (EmitWindows(bool(mean)),) if self.recurrents else ()
        return run_passes(program, (*steps, *windows, EmitLossScale()), self.callback)

    def rated(self, given: Program, number: int) -> RatedProgram:
        """Capture a program and form its partitions, up to the rates at which they fire."""
        in_time: tuple[Pass, ...] = (SeparateStates(self.recurrents),) if self.recurrents else ()
        steps = (
            *in_time,
            CaptureGraph(verify=self.verify, open_paths=modules_to_open(given.model, self.cuts), input_kind=number),
            *((ResolveStates(),) if self.recurrents else ()),
            MeasureNodes(),
            ResolveCuts(self.cuts),
            FormPartitions(),
            Legalize(),
        )
        program = run_passes(given, steps, self.callback)
        refuse_attributes(program)
        return RatedProgram(program, rates_of(program, self.every))

    def longer(self, whole: RatedProgram, windows: int) -> RatedProgram:
        """Capture the system for several windows laid end to end.

        Raises:
            CutError: It takes no several windows, or falls into other parts there.
        """
        if windows == 1:
            return whole
        args, kwargs = end_to_end(whole.program, windows)
        try:
            found = self.rated(Program(whole.program.model, args, kwargs), windows)
        except CutError:
            raise
        except Exception as error:
            error.add_note(
                f"while capturing {type(whole.program.model).__name__} with {windows} windows laid end to end along the first dimension "
                "of its inputs, for the part that fires once in as many"
            )
            raise
        if len(found.partitions) != len(whole.partitions) or found.windows != whole.windows:
            raise CutError(
                f"{type(whole.program.model).__name__} falls into {len(whole.partitions)} partitions for one window and "
                f"{len(found.partitions)} for {windows}; cut after modules that every window calls"
            )
        return found

    def formed(self, plan: Part, program: Program) -> tuple[Part, Program]:
        """Form the boundaries of a part, inside it and in time; states bear the names that the user knows them by."""
        in_time = bool(program.recurrents)
        steps: tuple[Pass, ...] = (*((ResolveStates(),) if in_time else ()), MeasureNodes(), Legalize())
        program = run_passes(program, (*steps, *((FormRecurrences(),) if in_time else ())), self.callback)
        keys = {f"states.{state.key}": self.recurrents[state.cut].state for state in plan.states}
        named = [
            replace(each, name=keys[each.cut.state] + each.name.removeprefix(each.cut.state))
            for each in program.recurrences
        ]
        return plan, replace(program, recurrences=tuple(named), notes=())

    def finished(self, program: Program, choices: Mapping[str, Choice]) -> Program:
        """Put interfaces on a part's own boundaries, and write its graphs.

        Raises:
            EstimatorError: An estimator needs the loss or the output's error.
        """
        inside = {each.name: choices[each.name] for each in program.boundaries}
        both = inside | {each.name: choices[each.name] for each in program.recurrences}
        in_time = bool(program.recurrents)
        steps = (
            InsertInterfaces(inside),
            *((InsertRecurrences(both),) if in_time else ()),
            SplitPartitions(),
            ScheduleActions(),
            EmitFused(),
            *((EmitWindows(),) if in_time else ()),
        )
        found = run_passes(program, steps, self.callback)
        refuse_end(found.interfaces)
        refuse_traces(found.recurrences)
        return found


def boundaries_of(formed: Sequence[tuple[Part, Program]]) -> list[Boundary]:
    """Return the boundaries of all parts, inside them and in time."""
    inside = [each for _, program in formed for each in program.boundaries]
    return inside + [as_boundary(each, 0) for _, program in formed for each in program.recurrences]


def part_named(program: Program, name: str) -> int:
    """Return the part that a module path or partition name lies in.

    Raises:
        LossError: It lies in several, or the part computes no output.
    """
    indices = {partition.index for partition in partitions_named(program, name)}
    parts = [part for part in program.parts if indices & set(part.partitions)]
    if len(parts) != 1 or not parts[0].results:
        what = (
            "lies in parts of different rates"
            if len(parts) != 1
            else "is in a part that computes no output of the model"
        )
        raise LossError(
            f"loss= names {name!r}, which {what}; name a module of the part whose outputs the loss compares"
        )
    return parts[0].index
