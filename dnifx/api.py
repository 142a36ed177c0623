"""``dnifx.decouple``: from a model and cuts to a decoupled module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from torch import Tensor, nn

from dnifx import schedules
from dnifx.errors import CaptureError, CutError, DnifxError, InputError, LegalizeError, LossError, PassError
from dnifx.ir import Program, Recurrent, Schedule
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.cuts.partition import FormPartitions
from dnifx.passes.cuts.resolve import CutSpec, FixedCuts, ResolveCuts, opened_by
from dnifx.passes.cuts.same_partitions import SamePartitions
from dnifx.passes.emit.code import program_code
from dnifx.passes.emit.folder import write_folder
from dnifx.passes.emit.fused import INPUT_MODELS, EmitFused, interface_root
from dnifx.passes.emit.split import SplitPartitions
from dnifx.passes.emit.step import StepWriter
from dnifx.passes.emit.windows import EmitWindows
from dnifx.passes.insert.interfaces import Choices, InputChoices, InsertInterfaces, make_context
from dnifx.passes.insert.same_interfaces import REMEDY, same_interfaces, same_owners
from dnifx.passes.legalize.legalize import Legalize
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import Callback, Pass, run_passes
from dnifx.passes.rates.rates import Rates
from dnifx.passes.rates.systems import SystemCompiler, part_named
from dnifx.passes.schedule import ScheduleActions
from dnifx.passes.time.recurrences import (
    FormRecurrences,
    InsertRecurrences,
    ResolveStates,
    SeparateStates,
    WholeWindow,
    spatial_choices,
    split_cuts,
)
from dnifx.report.system import SystemReport
from dnifx.report.terminal import ProgramReport, render
from dnifx.runtime.module.decoupled import DecoupledModule, Emitters
from dnifx.runtime.module.parts import System
from dnifx.runtime.module.system import DecoupledSystem
from dnifx.runtime.training.losses import Loss
from dnifx.runtime.training.part_loss import PartLoss

Reduction = Literal["mean", "sum"]


@overload
def decouple(
    model: nn.Module,
    cuts: CutSpec,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    gradient: Choices = "synthetic",
    context: Literal["label"] | Callable[[Any], Tensor] | None = None,
    num_classes: int | None = None,
    loss: Loss | Mapping[str, Loss] | None = None,
    reduction: Reduction | None = None,
    verify: bool = True,
    callback: Callback | None = None,
    every: Rates,
) -> DecoupledSystem: ...


@overload
def decouple(
    model: nn.Module,
    cuts: CutSpec,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    gradient: Choices = "synthetic",
    inputs: InputChoices = None,
    context: Literal["label"] | Callable[[Any], Tensor] | None = None,
    num_classes: int | None = None,
    mask: str | None = None,
    loss: Loss | None = None,
    reduction: Reduction | None = None,
    verify: bool = True,
    callback: Callback | None = None,
) -> DecoupledModule: ...


def decouple(
    model: nn.Module,
    cuts: CutSpec,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    gradient: Choices = "synthetic",
    inputs: InputChoices = None,
    context: Literal["label"] | Callable[[Any], Tensor] | None = None,
    num_classes: int | None = None,
    mask: str | None = None,
    loss: Loss | Mapping[str, Loss] | None = None,
    reduction: Reduction | None = None,
    verify: bool = True,
    callback: Callback | None = None,
    every: Rates | None = None,
) -> DecoupledModule | DecoupledSystem:
    """Cut a model and put a Decoupled Neural Interface on every cut.

    Args:
        model: Any module; its parameters and buffers are shared, never copied.
        cuts: Where: module paths and globs (``"layer2"``: after that module; ``"blocks.*"``), node names, ``dnifx.Edge``, a
            callable on graph nodes, ``"each"`` (after every parametrised block), or a number of partitions; and, alone or in
            the list, ``dnifx.Recurrent``: between the state that a window leaves and the one that the next window takes.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        gradient: An estimator of ``dnifx.estimators``, its name, a factory (spec -> nn.Module), or a mapping from boundary
            names or globs to any of these.
        inputs: Synthetic input models, for training that is unlocked forward too: ``"synthetic"``, a factory (spec -> nn.Module),
            or a mapping from boundary names or globs to these.
        context: What estimators see beside the values: ``"label"``, or a callable from what is passed as context to
            features [batch, ..., num_classes]. With ``every``, what the estimators between parts see, those of messages: of the
            target of the part that sends, in the window in which it sends, to features [batch, num_classes] or
            [messages, batch, ..., num_classes].
        num_classes: Number of classes of the label, or width of a callable's features: given with either.
        mask: Name of a tensor input [batch, length] that is non-zero for tokens that count; padding then neither trains an
            estimator nor receives a synthetic gradient.
        loss: (output, target) to a scalar or to one loss an example; a trainer needs it. With ``every``, also one for each part
            that computes outputs, by the path of a module in it; it sees that part's outputs.
        reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over examples; by default what ``loss.reduction`` says, else mean.
        verify: Compare what is captured with the model (outputs, gradients, buffers, random state) before it is taken.
        callback: Told of each pass: its name, seconds and result.
        every: In a system of several rates, the windows from one firing to the next of what is not fast, by module path or
            partition name: ``{"slow": 4}``, or ``dnifx.Every(4, scale=10.0)``. Inputs lead with time, messages with windows
            (``docs/architecture.md``).

    Returns:
        The decoupled module; with ``every``, the decoupled system.

    Raises:
        DnifxError: A child that says what cannot be done, where, and what to do instead.

    References:
        Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", ICML (arXiv 1608.05343).
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model= is {type(model).__name__}; decouple takes an nn.Module")
    if every is not None:
        refuse_with_rates(inputs=inputs, mask=mask)
        told = make_context(context, num_classes)
        system = SystemCompiler(*inside_and_time(cuts), every, gradient, told, verify, callback)
        try:
            return decoupled_system(system.compile(model, tuple(args), dict(kwargs or {})), loss, reduction)
        except DnifxError as error:
            error.add_note(f"while decoupling {type(model).__name__} with cuts={cuts!r}, every={dict(every)!r}")
            raise
    if isinstance(loss, Mapping):
        raise LossError("loss= is a mapping, which goes with every=; give one callable (output, target)")
    mean = is_mean(loss, reduction)
    options = CompileOptions(*split_cuts(cuts), gradient, inputs, context, num_classes, mask, mean, verify)
    try:
        program = run_passes(Program(model, tuple(args), dict(kwargs or {})), options.passes(model), callback)
    except DnifxError as error:
        error.add_note(f"while decoupling {type(model).__name__} with cuts={cuts!r}")
        raise
    roots = interface_root(model), interface_root(model, INPUT_MODELS)
    return DecoupledModule(program, loss, mean, roots, EMITTERS, options.again)


def decoupled_system(
    system: System, loss: Loss | Mapping[str, Loss] | None, reduction: Reduction | None
) -> DecoupledSystem:
    """Return a compiled system as a module.

    Raises:
        LossError: A loss names no part with outputs, or one callable is given where several parts have them.
    """
    losses: dict[int, PartLoss] = {}
    ends = [plan.index for plan in system.plans if plan.results]
    if isinstance(loss, Mapping):
        for name, each in loss.items():
            other = losses.setdefault(part_named(system, name), PartLoss(name, each, is_mean(each, reduction)))
            if other.name != name:
                raise LossError(f"loss= names {other.name!r} and {name!r}, which fire together; give one loss for both")
    elif loss is not None:
        if len(ends) != 1:
            raise LossError(
                f"{len(ends)} parts of the system compute outputs, so that one loss cannot be called with all of them in one step; give "
                'loss={"fast": ..., "slow": ...}, by the path of a module in each part that has one'
            )
        losses[ends[0]] = PartLoss(None, loss, is_mean(loss, reduction))
    root = interface_root(system.whole.model)
    mean = reduction != "sum" if reduction else all(each.mean for each in losses.values())
    return DecoupledSystem(system, losses, mean, root, EMITTERS, SystemReport, schedules.resolve_period)


def inside_and_time(cuts: CutSpec) -> tuple[CutSpec, tuple[Recurrent, ...]]:
    """Return the cuts inside a system and those in time.

    Raises:
        CutError: There is none inside, or it is a number, which would fall elsewhere for several windows.
    """
    inside, in_time = split_cuts(cuts)
    if inside is None or isinstance(inside, int):
        raise CutError(f"cuts={cuts!r} with every=: name the modules after which to cut, the last fast one among them")
    return inside, in_time


def refuse_with_rates(**given: Any) -> None:
    """Raise CutError where an option does not go together with ``every``."""
    for name, value in given.items():
        if value is not None:
            raise CutError(f"{name}= does not go together with every=: leave it out")


def default_passes(
    cuts: CutSpec,
    gradient: Choices = "synthetic",
    inputs: InputChoices = None,
    context: Any = None,
    num_classes: int | None = None,
    mean: bool = True,
) -> tuple[Pass, ...]:
    """Return the passes of ``decouple`` in order, for whoever runs them by hand."""
    options = CompileOptions(*split_cuts(cuts), gradient, inputs, context, num_classes, None, mean, verify=True)
    return options.passes(None)


@dataclass(frozen=True)
class CompileOptions:
    """What ``decouple`` was asked for, to compile the same model again for other inputs.

    Attributes:
        cuts: The cuts inside the model, or None where all cuts are in time.
        recurrents: The cuts in time.
    """

    cuts: CutSpec | None
    recurrents: tuple[Recurrent, ...]
    gradient: Choices
    inputs: InputChoices
    context: Any
    num_classes: int | None
    mask: str | None
    mean: bool
    verify: bool

    @property
    def inside(self) -> CutSpec:
        """The cuts inside the model; none where all are in time."""
        return () if self.cuts is None else self.cuts

    def passes(self, model: nn.Module | None) -> tuple[Pass, ...]:
        """Return the passes of the first compilation; what the cuts open is known where the model is."""
        opened = opened_by(model, self.inside) if model is not None else None
        return self.whole(CaptureGraph(verify=self.verify, open_paths=opened), ResolveCuts(self.inside))

    def again(self, first: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Program:
        """Compile the model for another input kind, with the same cuts and the same interfaces.

        Raises:
            InputError: The cuts fall elsewhere there.
        """
        opened = opened_by(first.model, self.inside)
        kept = tuple(each.path for each in first.capture.kept if each.path) if first.capture is not None else ()
        capture = CaptureGraph(verify=self.verify, open_paths=opened, keep_whole=kept, input_kind=number)
        given = Program(first.model, args, dict(kwargs))
        if self.cuts is not None:
            try:
                return same_owners(
                    first, same_interfaces(first, run_passes(given, self.whole(capture, SamePartitions(first), first)))
                )
            except (CutError, InputError, PassError, LegalizeError):
                pass
        cuts = FixedCuts(first.cuts) if isinstance(self.cuts, int) else ResolveCuts(self.inside)
        try:
            return same_interfaces(first, run_passes(given, self.whole(capture, cuts, first)))
        except (CutError, LegalizeError) as error:
            raise InputError(
                f"{type(first.model).__name__} computes something else for these inputs, and cannot be cut as before: {error}\n{REMEDY}"
            ) from error

    def whole(self, capture: Pass, cuts: Pass, first: Program | None = None) -> tuple[Pass, ...]:
        """Return all passes; those that cuts in time need stand among the others, and interfaces of ``first`` are used again."""
        existing = {} if first is None else {b.name: i for b, i in zip(first.boundaries, first.interfaces, strict=True)}
        earlier = () if first is None else first.recurrences
        spatial = spatial_choices(self.gradient, self.recurrents, self.cuts is not None)
        insert = InsertInterfaces(spatial, self.context, self.num_classes, self.inputs, self.mask, existing)
        return (
            *self.in_time(SeparateStates(self.recurrents)),
            capture,
            *self.in_time(ResolveStates()),
            MeasureNodes(),
            WholeWindow() if self.cuts is None else cuts,
            *(() if isinstance(cuts, SamePartitions) else (FormPartitions(),)),
            Legalize(),
            *self.in_time(FormRecurrences()),
            insert,
            *self.in_time(InsertRecurrences(self.gradient, earlier)),
            SplitPartitions(),
            ScheduleActions(),
            EmitFused(self.mean),
            *self.in_time(EmitWindows(self.mean)),
        )

    def in_time(self, step: Pass) -> tuple[Pass, ...]:
        """Return a pass that cuts in time need, where there are any."""
        return (step,) if self.recurrents else ()


def is_mean(loss: Loss | None, reduction: str | None) -> bool:
    """Whether the loss averages over examples.

    Raises:
        LossError: Neither ``"mean"`` nor ``"sum"``, or another than the loss itself says.
    """
    own = getattr(loss, "reduction", None)
    if reduction not in (None, "mean", "sum"):
        raise LossError(f"reduction={reduction!r}: give 'mean', 'sum' or None")
    if reduction is not None and own in ("mean", "sum") and own != reduction:
        raise LossError(f"reduction={reduction!r}, but the loss says reduction={own!r}; make them agree")
    return (reduction or own) != "sum"


def step_source(program: Program, schedule: Schedule, mean: bool, diagnose: bool) -> str:
    """Return the source of a training step, of a schedule that was checked; diagnosing, every target that can arrive does.

    Raises:
        ScheduleError: The schedule runs an action before what it depends on.
    """
    schedules.validate(schedule, program, partial=True)
    wanted = schedules.diagnosed(schedule, program) if diagnose else schedule
    return StepWriter(program, wanted, mean, diagnose).source()


def probe_source(program: Program, mean: bool, true: bool) -> str:
    """Return the source of a probe: a step that compares estimates with true gradients, or with targets, and changes nothing."""
    window = replace(program, recurrences=())
    return StepWriter(window, schedules.probing(window, true), mean, diagnose=True).source()


EMITTERS = Emitters(
    report=render,
    rich=ProgramReport,
    code=program_code,
    folder=write_folder,
    step=step_source,
    probe=probe_source,
    schedule=schedules.resolve,
)
