"""Compiles a system whose parts fire at different rates: the parts, and what stands between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dnifx.errors import ContextError, CutError, EstimatorError, LossError, nearest
from dnifx.ir import Context, Program, Recurrent, identifier
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.cuts.partition import FormPartitions
from dnifx.passes.cuts.resolve import CutSpec, ResolveCuts, glob_matches, opened_by
from dnifx.passes.emit.fused import EmitFused
from dnifx.passes.emit.split import SplitPartitions
from dnifx.passes.emit.windows import EmitWindows
from dnifx.passes.insert.interfaces import Choice, Choices, InsertInterfaces
from dnifx.passes.legalize.legalize import Legalize, free_name
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import Callback, Pass, run_passes
from dnifx.passes.rates.parts import Crossing, crossings, message, part_program, system_of
from dnifx.passes.rates.rated import RatedProgram, end_to_end
from dnifx.passes.rates.rates import Rates, partitions_named, rates_of
from dnifx.passes.schedule import ScheduleActions
from dnifx.passes.time.recurrences import FormRecurrences, InsertRecurrences, ResolveStates, SeparateStates
from dnifx.runtime.module.parts import PartPlan, System


@dataclass(frozen=True)
class SystemCompiler:
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

    def compile(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> System:
        """Capture the system once for each rate and take it apart.

        Raises:
            DnifxError: A child that says what cannot be done, where, and what to do instead.
        """
        whole = self.rated(Program(model, args, dict(kwargs)), 0)
        rated = {windows: self.longer(whole, windows) for windows in whole.windows}
        formed = [self.formed(*part_program(rated[windows], windows)) for windows in whole.windows]
        found = crossings(rated, formed)
        if self.context is not None and not found:
            raise ContextError(
                f"context= ({self.context.description}) is seen by the estimators of messages between parts, and no part of "
                f"every={dict(self.every)!r} fires less often than another: leave context= out, or every="
            )
        names = titles(found, [program for _, program in formed])
        choices = Chosen.of(self.gradient, names, [program for _, program in formed])
        programs = [self.finished(program, choices, index) for index, (_, program) in enumerate(formed)]
        first = sum(len(program.boundaries) for program in programs)
        messages = [
            message(
                each,
                first + number,
                name,
                choices.messages[name],
                self.scale(rated, each),
                programs[each.source],
                self.context,
            )
            for number, (each, name) in enumerate(zip(found, names, strict=True))
        ]
        return system_of(whole.program, [plan for plan, _ in formed], programs, messages, self.context)

    def rated(self, given: Program, number: int) -> RatedProgram:
        """Capture a program and form its partitions, up to the rates at which they fire."""
        in_time: tuple[Pass, ...] = (SeparateStates(self.recurrents),) if self.recurrents else ()
        steps = (
            *in_time,
            CaptureGraph(verify=self.verify, open_paths=opened_by(given.model, self.cuts), input_kind=number),
            *((ResolveStates(),) if self.recurrents else ()),
            MeasureNodes(),
            ResolveCuts(self.cuts),
            FormPartitions(),
            Legalize(),
        )
        program = run_passes(given, steps, self.callback)
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

    def formed(self, plan: PartPlan, program: Program) -> tuple[PartPlan, Program]:
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

    def finished(self, program: Program, choices: "Chosen", index: int) -> Program:
        """Put interfaces on a part's own boundaries, and write its graphs.

        Raises:
            EstimatorError: An estimator needs the loss or the output's error.
        """
        in_time = bool(program.recurrents)
        steps = (
            InsertInterfaces(choices.inside[index]),
            *((InsertRecurrences(choices.in_time[index]),) if in_time else ()),
            SplitPartitions(),
            ScheduleActions(),
            EmitFused(),
            *((EmitWindows(),) if in_time else ()),
        )
        found = run_passes(program, steps, self.callback)
        for interface in found.interfaces:
            if interface.needs_end:
                raise EstimatorError(
                    f"{interface.description} needs the loss or the output's error, and a system of several rates has no one loss; give "
                    "an estimator that learns from the target"
                )
        return found

    def scale(self, rated: Mapping[int, RatedProgram], crossing: Crossing) -> float:
        """Return what synthetic gradients of messages to a part are multiplied by."""
        return next(iter(rated.values())).rates[crossing.consumers[0]].scale


@dataclass(frozen=True)
class Chosen:
    """The estimators of a system, by where they stand.

    Attributes:
        messages: By the name of each boundary between parts.
        inside: By part, for its own boundaries.
        in_time: By part, for its states too.
    """

    messages: Mapping[str, Choice]
    inside: tuple[Choices, ...]
    in_time: tuple[Choices, ...]

    @classmethod
    def of(cls, gradient: Choices, names: Sequence[str], programs: Sequence[Program]) -> "Chosen":
        """Share out what the user chose.

        Raises:
            EstimatorError: A name is not there, or a boundary is left out.
        """
        inside = [[boundary.name for boundary in program.boundaries] for program in programs]
        in_time = [[each.name for each in program.recurrences] for program in programs]
        if not isinstance(gradient, Mapping):
            return cls(dict.fromkeys(names, gradient), (gradient,) * len(inside), (gradient,) * len(inside))
        every = [*names, *(name for part in (*inside, *in_time) for name in part)]
        chosen: dict[str, Choice] = {}
        for pattern, choice in gradient.items():
            matched = [name for name in every if name == pattern or glob_matches(pattern, name)]
            if not matched:
                raise EstimatorError(f"gradient= names {pattern!r}; the boundaries are {nearest(pattern, every, 10)}")
            chosen = {**dict.fromkeys(matched, choice), **chosen}
        missing = [name for name in every if name not in chosen]
        if missing:
            raise EstimatorError(f"gradient= gives nothing for {nearest('', missing, 10)}; name them, or add '**'")
        own = [{name: chosen[name] for name in part} for part in inside]
        both = [{name: chosen[name] for name in (*one, *other)} for one, other in zip(inside, in_time, strict=True)]
        return cls({name: chosen[name] for name in names}, tuple(own), tuple(both))


def titles(found: Sequence[Crossing], programs: Sequence[Program]) -> list[str]:
    """Return a name for each boundary between parts, other than those of all other boundaries.

    Raises:
        CutError: Two parts have boundaries of one name.
    """
    taken: set[str] = set()
    for program in programs:
        named = [*((b.key, b.name) for b in program.boundaries), *((r.key, r.name) for r in program.recurrences)]
        for key, name in named:
            if key in taken:
                raise CutError(f"two parts have a boundary named {name!r}; give the cuts other names")
            taken.add(key)
    names = []
    for crossing in found:
        names.append(free_name(crossing.name, taken))
        taken.add(identifier(names[-1]))
    return names


def part_named(system: System, name: str) -> int:
    """Return the part that a module path or partition name lies in.

    Raises:
        LossError: It lies in several, or the part computes no output.
    """
    indices = {partition.index for partition in partitions_named(system.whole, name)}
    parts = [plan for plan in system.plans if indices & set(plan.partitions)]
    if len(parts) != 1 or not parts[0].results:
        what = (
            "lies in parts of different rates"
            if len(parts) != 1
            else "is in a part that computes no output of the system"
        )
        raise LossError(
            f"loss= names {name!r}, which {what}; name a module of the part whose outputs the loss compares"
        )
    return parts[0].index
