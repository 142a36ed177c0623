"""``dnifx.decouple``: from a model and cuts to a decoupled module."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from dnifx import schedules
from dnifx.errors import CaptureError, DnifxError, LossError
from dnifx.ir import Program, Schedule
from dnifx.passes.capture import CaptureGraph
from dnifx.passes.code import program_code
from dnifx.passes.cuts import CutSpec, ResolveCuts
from dnifx.passes.emit import INPUT_MODELS, EmitFused, interface_root
from dnifx.passes.folder import write_folder
from dnifx.passes.insert import Choices, InputChoices, InsertInterfaces
from dnifx.passes.legalize import Legalize
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.partition import FormPartitions
from dnifx.passes.pipeline import Callback, Pass, run_passes
from dnifx.passes.schedule import ScheduleActions
from dnifx.passes.split import SplitPartitions
from dnifx.passes.stepcode import StepWriter
from dnifx.report.terminal import ProgramReport, render
from dnifx.runtime.module import DecoupledModule, Emitters
from dnifx.runtime.trainer import Loss


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
    loss: Loss | None = None,
    reduction: Literal["mean", "sum"] | None = None,
    callback: Callback | None = None,
) -> DecoupledModule:
    """Cut a model and put a Decoupled Neural Interface on every cut.

    Args:
        model: Any module; its parameters and buffers are shared, never copied.
        cuts: Where: module paths and globs (``"layer2"``: after that module; ``"blocks.*"``), node names, ``dnifx.Edge``, a
            callable on graph nodes, ``"each"`` (after every parametrised block), or a number of partitions.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        gradient: An estimator of ``dnifx.estimators``, its name, a factory (spec -> nn.Module), or a mapping from boundary
            names or globs to any of these.
        inputs: Synthetic input models, for training that is unlocked forward too: ``"synthetic"``, a factory (spec -> nn.Module),
            or a mapping from boundary names or globs to these.
        context: What estimators see beside the values: ``"label"``, or a callable from what is passed as context to
            features [batch, ..., num_classes].
        num_classes: Number of classes of the label; width of a callable's features.
        loss: (output, target) to a scalar or to one loss an example; a trainer needs it.
        reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over examples; by default what ``loss.reduction`` says, else mean.
        callback: Told of each pass: its name, seconds and result.

    Returns:
        The decoupled module.

    Raises:
        DnifxError: A child that says what cannot be done, where, and what to do instead.

    References:
        Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", ICML (arXiv 1608.05343).
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model= is {type(model).__name__}; decouple takes an nn.Module")
    mean = is_mean(loss, reduction)
    program = Program(model, tuple(args), dict(kwargs or {}))
    passes = default_passes(cuts, gradient, inputs, context, num_classes, mean)
    try:
        program = run_passes(program, passes, callback)
    except DnifxError as error:
        error.add_note(f"while decoupling {type(model).__name__} with cuts={cuts!r}")
        raise
    roots = interface_root(model), interface_root(model, INPUT_MODELS)
    return DecoupledModule(program, loss, mean, roots, EMITTERS)


def default_passes(
    cuts: CutSpec,
    gradient: Choices = "synthetic",
    inputs: InputChoices = None,
    context: Any = None,
    num_classes: int | None = None,
    mean: bool = True,
) -> tuple[Pass, ...]:
    """Return the passes of ``decouple``, in order."""
    return (
        CaptureGraph(),
        MeasureNodes(),
        ResolveCuts(cuts),
        FormPartitions(),
        Legalize(),
        InsertInterfaces(gradient, context, num_classes, inputs),
        SplitPartitions(),
        ScheduleActions(),
        EmitFused(mean),
    )


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
    """Return the source of a training step; when diagnosing, every target that can arrive does."""
    if diagnose and schedule is schedules.sequential(program):
        schedule = schedules.sequential(program, diagnose=True)
    return StepWriter(program, schedule, mean, diagnose).source()


EMITTERS = Emitters(
    report=render,
    rich=ProgramReport,
    code=program_code,
    folder=write_folder,
    step=step_source,
    schedule=schedules.resolve,
)
