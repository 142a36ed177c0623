"""``dnifx.decouple``: from a model and cuts to a decoupled module."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dnifx import schedules
from dnifx.engines.base import Engine, OneProcess
from dnifx.engines.cuda_graph import CudaGraph
from dnifx.engines.devices import Devices
from dnifx.engines.joining import join_ranks
from dnifx.engines.places import Place
from dnifx.engines.processes import processes_of
from dnifx.engines.ranks import Ranks
from dnifx.errors import CaptureError, DnifxError, LossError, PlaceError, ScheduleError
from dnifx.ir import Program, Schedule
from dnifx.passes.automatic_lag import automatic_lag
from dnifx.passes.compiler import Compiler
from dnifx.passes.cuts.resolve import CutSpec
from dnifx.passes.emit.code import emitted_code, program_code
from dnifx.passes.emit.folder import write_folder
from dnifx.passes.emit.fused import INPUT_MODELS, interface_root
from dnifx.passes.emit.joined_updates import can_wait
from dnifx.passes.emit.step import StepWriter
from dnifx.passes.insert.interfaces import Choices, InputChoices
from dnifx.passes.pipeline import Callback
from dnifx.passes.place import placed_ranks, traffic
from dnifx.passes.place_devices import names_devices, placed_devices, refuse_apart
from dnifx.passes.rates.rates import Rates
from dnifx.passes.rates.refusals import refuse_folder
from dnifx.passes.rates.systems import part_named
from dnifx.passes.time.states import with_named_states
from dnifx.report.html import to_html
from dnifx.report.plays import plays_of
from dnifx.report.svg import links_to, to_svg
from dnifx.report.terminal import ProgramReport, render
from dnifx.requests import check_request
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.net.fits import MakeOptimizer
from dnifx.runtime.net.losses import Loss, PartLoss
from dnifx.runtime.net.net import Emitters, Net

Reduction = Literal["mean", "sum"]


def decouple(
    model: nn.Module,
    cuts: CutSpec,
    *,
    args: tuple[Any, ...] | Tensor = (),
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
    estimator_optimizer: MakeOptimizer | None = None,
) -> DecoupledModule:
    """Cut a model and put a Decoupled Neural Interface on every cut.

    Args:
        model: Any module; its parameters and buffers are shared, never copied.
        cuts: Where: module paths and globs (``"layer2"``: after that module; ``"blocks.*"``), node names, ``dnifx.Edge``, a
            callable on graph nodes, ``"each"`` (after every parametrised block), or a number of partitions; and, alone or in
            the list, ``dnifx.Recurrent``: between the state that a window leaves and the one that the next window takes.
        args: Example positional inputs; a tensor stands for the only one.
        kwargs: Example keyword inputs.
        gradient: An estimator of ``dnifx.estimators``, its name, a factory (spec -> nn.Module), or a mapping from boundary
            names or globs to any of these. ``"synthetic"`` predicts by an affine map that costs little; ``"paper"`` is the network
            of the paper; ``"auto"`` learns from the loss where it is known, and the report says what it chose.
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
        estimator_optimizer: From parameters to an optimizer. With it, the net applies the fits of the estimators itself after every
            backward pass of a loop of your own, and leaves nothing in their ``.grad``. A trainer uses it too where it is given no
            other. The optimizer is ``net.estimator_optimizer``.

    Returns:
        The decoupled module.

    Raises:
        DnifxError: A child that says what cannot be done, where, and what to do instead.

    References:
        Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", ICML (arXiv 1608.05343).
    """
    check_request(model, args, kwargs, loss, every, callback)
    if isinstance(model, DecoupledModule):
        raise CaptureError(
            "model= is a net of dnifx.decouple already; give all cuts in one call, dnifx.decouple(net.original, cuts, ...)"
        )
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    cuts = with_named_states(model, cuts)
    compiler = Compiler(cuts, gradient, inputs, context, num_classes, mask, every, verify, callback)
    try:
        if every is None:
            if isinstance(loss, Mapping):
                raise LossError("loss= is a mapping, which goes with every=; give one callable (output, target)")
            compiler = replace(compiler, mean=is_mean(loss, reduction), loss=loss)
        program = compiler.compile(Program(model, positional, dict(kwargs or {})))
        losses, mean = part_losses(program, loss, reduction)
    except DnifxError as error:
        rates = "" if every is None else f", every={dict(every)!r}"
        error.add_note(f"while decoupling {type(model).__name__} with cuts={cuts!r}{rates}")
        inner = [path for path, each in model.named_modules() if isinstance(each, DecoupledModule)]
        if inner:
            error.add_note(
                f"{inner[0]!r} is a net of dnifx.decouple already: cut beside it, or give all its cuts at once"
            )
        raise
    roots = interface_root(program.model), interface_root(program.model, INPUT_MODELS)
    one = len({each.mean for each in losses.values()}) < 2
    again = replace(compiler, mean=mean if one else None).again
    return DecoupledModule(program, losses, mean, roots, EMITTERS, again, estimator_optimizer)


def part_losses(
    program: Program, loss: Loss | Mapping[str, Loss] | None, reduction: Reduction | None
) -> tuple[dict[int, PartLoss], bool]:
    """Return the loss of each part that has one, and whether gradients are means over examples in the others.

    Raises:
        LossError: A loss names no part with outputs, or one callable is given where several parts have them.
    """
    losses: dict[int, PartLoss] = {}
    if isinstance(loss, Mapping):
        for name, each in loss.items():
            mean = is_mean(each, reduction)
            other = losses.setdefault(part_named(program, name), PartLoss(each, mean, name, of_results=True))
            if other.name != name:
                raise LossError(f"loss= names {other.name!r} and {name!r}, which fire together; give one loss for both")
    elif loss is not None:
        ends = [part.index for part, _ in program.fired() if part.results or not program.parts]
        if len(ends) != 1:
            raise LossError(
                f"{len(ends)} parts of the model compute outputs, so one loss cannot be called with all of them in one step. Give "
                'loss={"fast": ..., "slow": ...}, by the path of a module in each part that has one'
            )
        losses[ends[0]] = PartLoss(loss, is_mean(loss, reduction), of_results=bool(program.parts))
    return losses, reduction != "sum" if reduction else all(each.mean for each in losses.values())


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


def step_source(
    program: Program,
    schedule: Schedule,
    mean: bool,
    diagnose: bool,
    ranks: schedules.Ranks = (),
    rank: int = 0,
    scaled: bool = False,
    joined: bool = False,
    places: Sequence[Place] = (),
    batched: bool = False,
    *,
    clocked: bool = False,
) -> str:
    """Return the source of a training step, of a schedule that was checked; diagnosing, every target that can arrive does.

    With ``ranks``, those of the partitions, it is the step of one rank; or, where ``places`` says what these are in one process, of all
    of them. Where it is ``scaled``, its backward passes are those of a multiple of the loss. Where updates may be ``joined``, they wait
    for each other as long as nothing reads what they write. Where it is ``batched``, estimators that are alike are asked in one call.
    Where it is ``clocked``, it tells ``self.clock`` the name of each action when it has ended.

    Raises:
        ScheduleError: The schedule runs an action before what it depends on.
    """
    if places:
        refuse_apart(program, places, ranks)
        schedule = schedules.without_devices(schedule, program, ranks, places)
    schedules.validate(schedule, program, partial=True)
    schedules.refuse_other_places(schedule, program, ranks)
    wanted = schedules.diagnosed(schedule, program) if diagnose else schedule
    if ranks:
        wanted = schedules.transferred(wanted, program, ranks)
        schedules.validate(wanted, program, partial=True)
    waits = joined and not clocked and can_wait(program)
    writer = StepWriter(program, wanted, mean, diagnose, ranks, rank, scaled=scaled, clocked=clocked, joined=waits)
    return replace(writer, places=tuple(map(str, places)), batched=batched).source()


def evaluation_source(program: Program, ranks: schedules.Ranks, rank: int, places: Sequence[Place] = ()) -> str:
    """Return the source of a rank's forward pass, without gradients; or that over all places of this process.

    Raises:
        PlaceError: The program has another number of partitions than there are ranks.
    """
    if len(program.partitions) != len(ranks):
        raise PlaceError(
            f"in this mode the model has {len(program.partitions)} partitions, and {len(ranks)} in training, so it does not run over the "
            "same ranks. Call trainer.collect(), and evaluate with net(x)"
        )
    wanted, called = schedules.evaluation(program, ranks), tuple(map(str, places))
    return StepWriter(program, wanted, ranks=ranks, rank=rank, evaluates=True, places=called).source()


def ranks_for(places: Any, spec: schedules.Spec, program: Program, count: int) -> schedules.Ranks:
    """Return the rank of each partition, one of ``count``, as places or the schedule say it.

    Raises:
        PlaceError: There are no processes, or the partitions cannot run on these ranks.
    """
    first = schedules.period_of(spec, program)
    named = schedules.ranks_of(first, program) if isinstance(first, Schedule) else None
    return placed_ranks(named if named is not None and places == "ranks" else places, program, count)


def chosen_lag(lag: Any, places: Any, spec: schedules.Spec, program: Program, mesh: Any) -> int:
    """Return how late targets are, as a number of steps; ``"auto"`` measures the ranks and the links between them.

    Raises:
        ScheduleError: It is no number of steps, or there are no ranks to measure.
    """
    if lag == "auto" and mesh is not None:
        raise ScheduleError(
            "lag='auto' measures the links of one replica, and mesh= has several, which may measure otherwise: give a number of steps"
        )
    if lag == "auto" and (places is None or names_devices(places)):
        raise ScheduleError(
            "lag='auto' measures the links between ranks, and one process has none: give a number of steps, or places=\"ranks\""
        )
    if lag == "auto" and any(each.device.type == "meta" for each in program.partitions):
        raise ScheduleError(
            "lag='auto' times a forward pass, and a model on the meta device has no values to compute: give a number of steps"
        )
    if lag == "auto":
        schedules.lagged(schedules.sequential(program), program, 1)
        return automatic_lag(program, ranks_for(places, spec, program, join_ranks()[1]))
    if isinstance(lag, bool) or not isinstance(lag, int):
        raise ScheduleError(f"{lag=} is not a number of steps; give 0 or more, or 'auto' over ranks")
    return lag


def recorded_on(engine: Any, places: Any, program: Program) -> torch.device:
    """Return the device on which steps are recorded as CUDA graphs.

    Raises:
        PlaceError: There is no such engine, or the model is not on one CUDA device.
    """
    devices = {each.device for each in program.model.parameters()} or {torch.device("cpu")}
    if engine != "cuda-graph":
        raise PlaceError(f"engine={engine!r}: there is one by name, 'cuda-graph'; places= chooses the others")
    if places is not None:
        raise PlaceError(
            "engine='cuda-graph' records the step of one device, and places= names others. Leave one of the two out"
        )
    if len(devices) > 1 or any(each.type != "cuda" for each in devices):
        raise PlaceError(
            f"engine='cuda-graph' needs the model on one CUDA device, and it is on {', '.join(sorted(map(str, devices)))}. Move it there "
            "before dnifx.decouple, or leave engine= out"
        )
    return devices.pop()


def devices_for(places: Any, spec: schedules.Spec, program: Program) -> Any:
    """Return the places in this process, as they were given or as the schedule names them; None where it names none."""
    if places is not None:
        return places if names_devices(places) else None
    return schedules.places_of(schedules.period_of(spec, program), program)


def engine_for(
    engine: Any, places: Any, spec: schedules.Spec, program: Program, lags: tuple[int, Any], timeout: float, mesh: Any
) -> Engine:
    """Return what runs a trainer's steps: this process, in one place or in several, or all processes of a run.

    Raises:
        PlaceError: There are no processes, or the partitions cannot run on these ranks.
    """
    given = devices_for(places, spec, program)
    if mesh is not None and (places is None or given is not None or engine is not None):
        raise PlaceError(
            'mesh= arranges processes as replicas by places: give places="ranks" or the rank of each partition with it, or leave mesh= out'
        )
    late, tied = schedules.latest(schedules.period_of(spec, program), program, *lags)
    if engine is not None:
        return CudaGraph(recorded_on(engine, given if places is None else places, program))
    if given is not None:
        return Devices(program, *placed_devices(given, program), late)
    if places is None:
        return OneProcess()
    processes = processes_of(mesh)
    ranks = ranks_for(places, spec, program, len(processes.members))
    device = program.partitions[ranks.index(processes.rank)].device
    computes = torch.device("cpu") if device.type == "meta" else device
    return Ranks(ranks, late, tied, traffic(program, ranks)[processes.rank], computes, timeout, processes)


def trained_schedule(
    spec: schedules.Spec, program: Program, lags: tuple[int, Any], engine: Engine
) -> schedules.ScheduleSource:
    """Return the source of a trainer's schedule, after checking its first step or period, places and lag included.

    Raises:
        ScheduleError: There is no such schedule, it is not valid for the program, or one process cannot run it.
    """
    source, (lag, tied) = schedules.resolve(spec, program), lags
    if lag or tied:
        source = schedules.resolve(schedules.Lagged(lag, source, tied), program)
    if schedules.is_delayed(program):
        source = schedules.resolve(schedules.Delayed(source), program)
    first = schedules.period_of(source, program)
    if engine.places and isinstance(first, Schedule):
        first = schedules.without_devices(first, program, engine.places, engine.named)
    schedules.refuse_other_places(first, program, engine.ranks or ())
    return source


def probe_source(program: Program, mean: bool, true: bool) -> str:
    """Return the source of a probe: a step that compares estimates with true gradients, or with targets, and changes nothing."""
    window = replace(program, recurrences=())
    return StepWriter(window, schedules.probing(window, true), mean, diagnose=True).source()


def write_package(net: Net, path: str | os.PathLike[str], overwrite: bool) -> None:
    """Write a decoupled module as a package; see ``write_folder``."""
    refuse_folder(net.program)
    if schedules.is_delayed(net.program):
        raise DnifxError(
            "a net with Late(k) cannot be written to a folder: a package runs one step, and steps under way are kept over several. Train "
            "it here, and write the trained original with its own tools"
        )
    write_folder(net, path, overwrite)


def picture(program: Program, code: str | os.PathLike[str] | None) -> str:
    """Return a program as SVG; its boxes link to the lines of a file with the emitted code.

    Raises:
        DnifxError: The file cannot be read.
    """
    if code is None:
        return to_svg(program)
    try:
        text = Path(code).read_text(encoding="utf-8")
    except OSError as error:
        raise DnifxError(
            f"code= is {str(code)!r}, which cannot be read: {error.strerror}; name the model.py of an emitted folder"
        ) from error
    return to_svg(program, links_to(text, Path(code).as_posix()))


def page(net: Net, schedule: Any = None) -> str:
    """Return a decoupled module as an HTML page; it plays the given schedule, or its own."""
    chosen = None if schedule is None else schedules.period_of(schedule, net.program)
    emitted = [emitted_code(each.program, each.mean, each.part) for each in net.parts]
    return to_html(net.program, emitted, plays_of(net.program, chosen))


EMITTERS = Emitters(
    report=render,
    rich=ProgramReport,
    svg=picture,
    html=page,
    code=program_code,
    folder=write_package,
    step=step_source,
    evaluation=evaluation_source,
    probe=probe_source,
    lag=chosen_lag,
    schedule=trained_schedule,
    engine=engine_for,
)
