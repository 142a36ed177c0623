"""The compiler: all passes in order, from a model and cuts to a program that can run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dnifx.errors import CutError, DnifxError, InputError, LegalizeError, PassError
from dnifx.ir import Program, Recurrent
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.capture.verification import MOST_OUTCOMES
from dnifx.passes.compiled import without_compilation
from dnifx.passes.cuts.partition import FormPartitions
from dnifx.passes.cuts.resolve import CutSpec, FixedCuts, ResolveCuts, modules_to_open
from dnifx.passes.cuts.same_partitions import SamePartitions
from dnifx.passes.emit.fused import EmitFused
from dnifx.passes.emit.loss_scale import EmitLossScale
from dnifx.passes.emit.split import SplitPartitions
from dnifx.passes.emit.windows import EmitWindows
from dnifx.passes.insert.contexts import make_context
from dnifx.passes.insert.interfaces import Choices, InputChoices, InsertInterfaces
from dnifx.passes.insert.same_interfaces import REMEDY, same_interfaces, same_owners
from dnifx.passes.legalize.legalize import Legalize
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import Callback, Pass, run_passes
from dnifx.passes.rates.rates import Rates
from dnifx.passes.rates.refusals import refuse_kept_states, refuse_options
from dnifx.passes.rates.systems import RateCompiler
from dnifx.passes.schedule import ScheduleActions
from dnifx.passes.time.recurrences import FormRecurrences, InsertRecurrences, spatial_choices
from dnifx.passes.time.states import ResolveStates, SeparateStates, WholeWindow, split_cuts
from dnifx.runtime.net.losses import Loss
from dnifx.runtime.net.model_states import states_put_back


@dataclass(frozen=True)
class Compiler:
    """What ``decouple`` was asked for. It compiles the model, and the same model again for other inputs.

    Attributes:
        cuts: The cuts inside the model and in time.
        gradient: The estimators.
        inputs: The synthetic input models.
        context: What estimators see beside the values.
        num_classes: Classes of a label, or width of a callable's features.
        mask: Name of the input that says which tokens count.
        every: How often parts fire; None where all fires in every window.
        verify: Compare what is captured with the model before it is taken.
        callback: Told of each pass.
        mean: Whether losses average over examples (else they sum); None where some do and others do not.
        loss: The loss of the model's output, where there is one.
    """

    cuts: CutSpec
    gradient: Choices = "synthetic"
    inputs: InputChoices = None
    context: Any = None
    num_classes: int | None = None
    mask: str | None = None
    every: Rates | None = None
    verify: bool = True
    callback: Callback | None = None
    mean: bool | None = True
    loss: Loss | None = None

    @property
    def recurrents(self) -> tuple[Recurrent, ...]:
        """The cuts in time."""
        return split_cuts(self.cuts)[1]

    @property
    def kept_states(self) -> tuple[str, ...]:
        """The attributes that hold states which are cut in time."""
        return tuple(cut.state for cut in self.recurrents if cut.on_model)

    @property
    def inside(self) -> CutSpec:
        """The cuts inside the model; none where all are in time."""
        inside = split_cuts(self.cuts)[0]
        return () if inside is None else inside

    @property
    def only_in_time(self) -> bool:
        """Whether all cuts are in time."""
        return split_cuts(self.cuts)[0] is None

    def compile(self, given: Program) -> Program:
        """Run all passes on a program that has a model and example inputs.

        Raises:
            DnifxError: A child that says what cannot be done, where, and what to do instead.
        """
        plain = without_compilation(given)
        with states_put_back(plain.model, self.recurrents):
            if self.every is None:
                return run_passes(plain, self.passes(plain.model), self.callback)
            return self.with_rates(self.every).compile(plain)

    def with_rates(self, every: Rates) -> RateCompiler:
        """Return what compiles a model of several rates.

        Raises:
            CutError: An option does not go together with rates.
        """
        refuse_options(self.cuts, self.inside, inputs=self.inputs, mask=self.mask)
        refuse_kept_states(self.recurrents)
        context = make_context(self.context, self.num_classes)
        return RateCompiler(self.inside, self.recurrents, every, self.gradient, context, self.verify, self.callback)

    def passes(self, model: nn.Module | None = None) -> tuple[Pass, ...]:
        """Return the passes of the first compilation; what the cuts open is known where the model is."""
        opened = modules_to_open(model, self.inside) if model is not None else None
        capture = CaptureGraph(verify=self.verify, open_paths=opened, varying=self.kept_states, outcomes=MOST_OUTCOMES)
        return self.whole(capture, ResolveCuts(self.inside))

    def again(self, first: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Program:
        """Compile the model for another input kind, with the same cuts and the same interfaces.

        Raises:
            InputError: The cuts fall elsewhere there.
        """
        if self.every is not None:
            return self.with_rates(self.every).fused(first, args, kwargs, number, self.mean)
        opened = modules_to_open(first.model, self.inside)
        kept = tuple(each.path for each in first.capture.kept if each.path) if first.capture is not None else ()
        moved = first.signature.varying if first.signature is not None else ()
        varying = tuple(dict.fromkeys((*self.kept_states, *moved)))
        capture = CaptureGraph(
            verify=self.verify, open_paths=opened, keep_whole=kept, input_kind=number, varying=varying
        )
        with states_put_back(first.model, self.recurrents):
            try:
                return self.captured_again(first, args, kwargs, capture)
            except DnifxError:
                if varying == self.kept_states:
                    raise
            return self.captured_again(first, args, kwargs, replace(capture, varying=self.kept_states))

    def captured_again(
        self, first: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], capture: CaptureGraph
    ) -> Program:
        """Compile the model again with a capture of its own.

        Raises:
            InputError: The cuts fall elsewhere there.
        """
        given = Program(first.model, args, dict(kwargs))
        if not self.only_in_time:
            try:
                return same_owners(
                    first, same_interfaces(first, run_passes(given, self.whole(capture, SamePartitions(first), first)))
                )
            except (CutError, InputError, PassError, LegalizeError):
                pass
        cuts = FixedCuts(first.cuts) if isinstance(self.inside, int) else ResolveCuts(self.inside)
        try:
            return same_interfaces(first, run_passes(given, self.whole(capture, cuts, first)))
        except (CutError, LegalizeError) as error:
            raise InputError(
                f"{type(first.model).__name__} computes something else for these inputs, and cannot be cut as before: {error}\n{REMEDY}"
            ) from error

    def whole(self, capture: CaptureGraph, cuts: Pass, first: Program | None = None) -> tuple[Pass, ...]:
        """Return all passes; those that cuts in time need stand among the others, and interfaces of ``first`` are used again."""
        existing = {} if first is None else {b.name: i for b, i in zip(first.boundaries, first.interfaces, strict=True)}
        earlier = () if first is None else first.recurrences
        spatial = spatial_choices(self.gradient, self.recurrents, not self.only_in_time)
        asked = spatial, self.context, self.num_classes, self.inputs, self.mask
        insert = InsertInterfaces(*asked, existing, self.loss, bool(self.mean))
        return (
            *self.in_time(SeparateStates(self.recurrents)),
            capture,
            *self.in_time(ResolveStates()),
            MeasureNodes(),
            WholeWindow() if self.only_in_time else cuts,
            *(() if isinstance(cuts, SamePartitions) else (FormPartitions(),)),
            Legalize(),
            *self.in_time(FormRecurrences()),
            insert,
            *self.in_time(InsertRecurrences(self.gradient, earlier)),
            SplitPartitions(),
            ScheduleActions(),
            EmitFused(bool(self.mean)),
            *self.in_time(EmitWindows(bool(self.mean), capture.input_kind)),
            EmitLossScale(),
        )

    def in_time(self, step: Pass) -> tuple[Pass, ...]:
        """Return a pass that cuts in time need, where there are any."""
        return (step,) if self.recurrents else ()
