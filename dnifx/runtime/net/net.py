"""The net as its trainer sees it: a model with an estimator on every cut, and its parts with their graphs."""

import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from dnifx.engines.base import Engine
from dnifx.errors import InputError, LossError, StateError
from dnifx.ir import Boundary, Partition, Program, Recurrence, Schedule, own_parameters
from dnifx.runtime.emitted.loss_scale import Factor, LossScale
from dnifx.runtime.emitted.recording import Recorder
from dnifx.runtime.net.captured import CapturedPart, Recompile
from dnifx.runtime.net.fits import FitWatch, MakeOptimizer, OwnFits
from dnifx.runtime.net.input_kinds import InputKind, share_state
from dnifx.runtime.net.losses import Loss, PartLoss
from dnifx.runtime.net.model_states import with_example_states


@dataclass(frozen=True)
class Emitters:
    """What a decoupled module asks of the packages above it.

    Attributes:
        report: The program as text for people.
        rich: The program as a rich renderable.
        svg: The program as a picture; with the file of its emitted code, to which boxes then link.
        html: A module as a page that unfolds; with the schedule that it plays.
        code: The program as Python; with whether the loss is a mean.
        folder: Writes a module as a package.
        step: The source of a training step, from a schedule, whether the loss is a mean, whether to diagnose, the rank of each
            partition, the rank that it is for, whether its backward passes are those of a multiple of the loss, whether updates may be
            joined, the places of this process that the ranks stand for, and whether estimators that are alike are asked in one call.
        evaluation: The source of a forward pass over ranks, or over the places of this process.
        probe: The source of a probe, from whether the loss is a mean and whether targets are the true gradients.
        lag: From what a user gives as lag, as places and as mesh, and a schedule's specification, to a number of steps.
        schedule: From a schedule's specification, the lags of targets and of tied parameters, and an engine to what gives each step its
            schedule.
        engine: From what a user gives as engine, as places and as mesh, a schedule's specification, both lags and a timeout to what runs
            the steps.
    """

    report: Callable[[Program], str]
    rich: Callable[[Program], Any]
    svg: Callable[[Program, str | os.PathLike[str] | None], str]
    html: Callable[["Net", Any], str]
    code: Callable[[Program, bool], str]
    folder: Callable[["Net", str | os.PathLike[str], bool], None]
    step: Callable[[Program, Schedule, bool, bool, tuple[int, ...], int, bool, bool, Sequence[Any], bool], str]
    evaluation: Callable[[Program, tuple[int, ...], int, Sequence[Any]], str]
    probe: Callable[[Program, bool, bool], str]
    lag: Callable[[Any, Any, Any, Program, Any], int]
    schedule: Callable[[Any, Program, tuple[int, Any], Engine], Any]
    engine: Callable[[Any, Any, Any, Program, tuple[int, Any], float, Any], Engine]


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
        estimator_optimizer: Makes the optimizer of the estimators, where the net is to apply the fits itself.

    Attributes:
        original: The user's model.
        program: All partitions and boundaries, as reports and schedules number them.
        parts: What fires together; one part where the net has no rates.
        whole: The fused program. It is the part itself where there is one.
        recurrences: The boundaries in time of all parts.
        imagines: Whether there are synthetic input models.
        make_estimator_optimizer: Makes the optimizer of the estimators, where it was given to ``dnifx.decouple``.
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
        estimator_optimizer: MakeOptimizer | None = None,
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
        fitted = list(self.interface_parameters())
        fits = OwnFits(fitted, estimator_optimizer) if estimator_optimizer is not None else None
        watch = FitWatch(fitted, list(first_parameters(program)))
        scale = LossScale(begins=watch.begins if fits is None else fits.begins)
        self.__dict__.update(_scale=scale, _fits=fits, _watch=watch, make_estimator_optimizer=estimator_optimizer)
        whole = CapturedPart(parts[0].part, program, self, mean, recompile) if program.parts else parts[0]
        trained = dict(program.model.named_parameters(remove_duplicate=False))
        producers = {
            each.name: [trained[name] for name in own_parameters(program.partitions, each.producer)]
            for each in program.boundaries
        }
        self.__dict__.update(recorder=Recorder(producers))
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
    elsewhere: str = ""
    """Where the present weights of some partitions are, if not here: in other processes."""

    spread: str = ""
    """Where they are, if all are here but on several devices."""

    diagnosing: bool = False
    """Whether backward passes of a loop of your own compare synthetic gradients with what arrives; see ``diagnostics``."""

    recurrences: tuple[Recurrence, ...]
    recorder: Recorder
    _scale: LossScale
    _fits: OwnFits | None
    _watch: FitWatch
    make_estimator_optimizer: MakeOptimizer | None

    @property
    def loss_scale(self) -> Factor | Callable[[], Factor] | GradScaler:
        """What a loop of your own multiplies the loss by before ``backward()``; 1 unless you set it.

        Set a number (``1 / 4`` where four micro-batches accumulate ``loss / 4``), a tensor of one element, a ``GradScaler``, or a
        callable that returns a number or a tensor. It is read in the backward pass. Where the model returns its loss, the net knows
        the factor by itself. A trainer's steps have no such factor.
        """
        return self._scale.value

    @loss_scale.setter
    def loss_scale(self, value: Factor | Callable[[], Factor] | GradScaler) -> None:
        refuse_scale(value)
        self._scale.value = value
        self._watch.scale_is_said = True

    @property
    def estimator_optimizer(self) -> Optimizer | None:
        """The optimizer with which the net applies the fits after each backward pass of a loop of your own, if it does so itself."""
        return None if self._fits is None else self._fits.optimizer

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

    def model_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the model, without those of estimators and input models."""
        yield from self.original.parameters()

    def parameter_groups(
        self,
        lr: float | None = None,
        estimator_lr: float | None = None,
        weight_decay: float | None = None,
        estimator_weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Return two parameter groups for an optimizer: the model's, and that of estimators and input models.

        Args:
            lr: The learning rate of the model; the optimizer's own by default.
            estimator_lr: The learning rate of the estimators; ``lr`` by default.
            weight_decay: That of the model; the optimizer's own by default.
            estimator_weight_decay: That of the estimators, whose answers it would draw to zero.
        """
        own = {"lr": lr, "weight_decay": weight_decay}
        theirs = {"lr": lr if estimator_lr is None else estimator_lr, "weight_decay": estimator_weight_decay}
        groups = [(self.model_parameters(), own), (self.interface_parameters(), theirs)]
        found = []
        for parameters, options in groups:
            trained = [each for each in parameters if each.requires_grad]
            if trained:
                given = {name: value for name, value in options.items() if value is not None}
                found.append({"params": trained, **given})
        return found

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        """Clip the gradients of the model alone, as ``torch.nn.utils.clip_grad_norm_`` does; fits stay as they are.

        Returns:
            The norm of the model's gradients before, a scalar.
        """
        return nn.utils.clip_grad_norm_(self.model_parameters(), max_norm, norm_type, error_if_nonfinite, foreach)

    def diagnostics(self, prefix: str = "") -> dict[str, float]:
        """Return how synthetic gradients compared with what arrived, the last time that this was looked at.

        That is the last backward pass of a loop of your own after ``net.diagnosing = True``, or the last step of a trainer with
        ``diagnose=True``. The dictionary is flat, for TensorBoard, a logger or a data frame. Its keys are ``prefix``, the boundary's
        name, a slash, and one of

        - ``cosine``: between estimate and target, a mean over examples;
        - ``parameter_cosine``: between the gradients that the two give to the parameters of the partition that makes the values, those
          that other partitions read too left out; where it is known;
        - ``relative_error``, ``wrong_signs``, ``estimate_norm``, ``target_norm`` and ``estimator_loss``, the mean over examples of
          ||estimate - target||^2.

        Targets are those that estimators are fitted to: they may contain synthetic gradients of later boundaries.

        Raises:
            StateError: Nothing was looked at, and nothing will be.
        """
        if not self.diagnosing and not self.recorder.found:
            raise StateError(
                "nothing was compared yet: set net.diagnosing = True before the forward passes of a loop of your own, or call "
                "trainer.step(..., diagnose=True)"
            )
        found = self.recorder.found.items()
        return {f"{prefix}{name}/{key}": float(number) for name, numbers in found for key, number in numbers.items()}

    def interface_keys(self) -> list[str]:
        """Return the keys of all estimators and input models."""
        return [*(each.key for each in self.boundaries), *(each.key for each in self.program.recurrences)]

    def interface_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of estimators and input models."""
        in_time = (each.interface for each in self.recurrences if each.interface is not None)
        for interface in (*self.program.interfaces, *in_time):
            yield from interface.estimator.parameters()
            if interface.input_model is not None:
                yield from interface.input_model.parameters()


def first_parameters(program: Program) -> Iterable[nn.Parameter]:
    """Return the parameters whose gradients a backward pass finds after it has passed all boundaries inside the model."""
    first = min((each.producer for each in program.boundaries), default=len(program.partitions) - 1)
    later = {name for each in program.partitions if each.index > first for name in each.uses}
    names = {name for each in program.partitions if each.index <= first for name in each.uses} - later
    return (each for name, each in program.model.named_parameters() if name in names)


def refuse_scale(value: Any) -> None:
    """Raise LossError where a value cannot be a loss scale."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not (
        number or (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, GradScaler) or callable(value)
    ):
        raise LossError(
            f"net.loss_scale={value!r}: give what the loss is multiplied by before backward(): a number above 0, a tensor of one "
            "element, a GradScaler, or a callable that returns a number or a tensor"
        )


def refuse_other_inputs(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Program:
    """Raise InputError: one of several parts holds for the inputs and modes that it was captured for."""
    shapes = ", ".join(str(tuple(value.shape)) for value in args[0] if isinstance(value, Tensor))
    raise InputError(
        f"a part of the net was captured for other inputs or another mode (it now takes {shapes}). Decouple the model again, with an "
        "example of this call and in this mode"
    )
