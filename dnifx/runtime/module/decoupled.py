"""The decoupled module: the user's model with interfaces, to be used in anybody's training loop."""

import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.errors import ContextError, CutError, EstimatorError, InputError, LossError, PassError
from dnifx.ir import CONSTANTS, Boundary, Partition, Program, Schedule
from dnifx.runtime.emitted.interface import losses_of, tell_losses
from dnifx.runtime.emitted.ops import GuardError
from dnifx.runtime.module.attach import attach
from dnifx.runtime.module.input_kinds import InputKind, Undo, hold_constants, what_is_read
from dnifx.runtime.module.states import refuse_without_trainer, with_own_tensors, without_episodes
from dnifx.runtime.training.losses import Loss
from dnifx.runtime.training.optimizers import OptimizerSpec, SchedulerSpec
from dnifx.runtime.training.trainer import Trainer


@dataclass(frozen=True)
class Emitters:
    """What a decoupled module asks the compiler for after it was made.

    Attributes:
        report: The program as text for people.
        rich: The program as a rich renderable.
        code: The program as Python; with whether the loss is a mean.
        folder: Writes a module as a package.
        step: The source of a training step, from a schedule, whether the loss is a mean, and whether to diagnose.
        probe: The source of a probe, from whether the loss is a mean and whether targets are the true gradients.
        schedule: From a schedule's specification to what gives each step its schedule.
    """

    report: Callable[[Program], str]
    rich: Callable[[Program], Any]
    code: Callable[[Program, bool], str]
    folder: Callable[["DecoupledModule", str | os.PathLike[str], bool], None]
    step: Callable[[Program, Schedule, bool, bool], str]
    probe: Callable[[Program, bool, bool], str]
    schedule: Callable[[Any, Program], Any]


EXTRA_STATE = "_extra_state"
"""The name under which torch saves what a module's ``get_extra_state`` gives."""
Recompile = Callable[[Program, tuple[Any, ...], Mapping[str, Any], int], Program]
MOST_INPUT_KINDS = 16
"""How many kinds of inputs one module captures before it says that something changes that should not."""


class DecoupledModule(nn.Module):
    """A model with a Decoupled Neural Interface on every cut; call it as you call the model.

    It holds the model's own children, parameters and buffers under their own names, and the estimators beside them. Outside
    ``torch.no_grad()`` the fused graph runs: same output, and in the backward pass every cut gives its producer the
    synthetic gradient and its estimator the target. Under ``torch.no_grad()`` the original model runs; so it does in
    evaluation mode where there are synthetic inputs, which serve training alone, or where (with a warning) other values cross
    the cuts than in training.

    Args:
        program: A program that went through all passes.
        loss: The loss of the trainer: (output, target) to a scalar or one loss an example.
        mean: Whether the loss averages over examples (else it sums).
        roots: The attributes that hold the estimators and the input models.
        emitters: The compiler's back ends.
        recompile: Compiles the model again for another input kind: (program, args, kwargs, its number) to a program.
    """

    def __init__(
        self,
        program: Program,
        loss: Loss | None,
        mean: bool,
        roots: tuple[str, str],
        emitters: Emitters,
        recompile: Recompile,
    ) -> None:
        super().__init__()
        self.__dict__["original"] = program.model
        self.__dict__["program"] = program
        self.__dict__["_parameters"] = program.model._parameters
        self.__dict__["_buffers"] = program.model._buffers
        self.__dict__["_non_persistent_buffers_set"] = program.model._non_persistent_buffers_set
        self._modules.update(program.model._modules)
        estimators = {b.key: i.estimator for b, i in zip(program.boundaries, program.interfaces, strict=True)}
        estimators.update((each.key, each.interface.estimator) for each in program.recurrences if each.interface)
        estimators.update((f"{each.key}_head", each.head) for each in program.recurrences if each.head is not None)
        self.add_module(roots[0], nn.ModuleDict(estimators))
        imagined = {
            boundary.key: interface.input_model
            for boundary, interface in zip(program.boundaries, program.interfaces, strict=True)
            if interface.input_model is not None
        }
        if imagined:
            self.add_module(roots[1], nn.ModuleDict(imagined))
        self.imagines = bool(imagined)
        self.training = program.model.training
        self.__dict__.update(loss=loss, mean=mean, emitters=emitters, recompile=recompile)
        self.__dict__.update(input_kinds=[self.input_kind_of(program)], uncut=set())

    original: nn.Module
    program: Program
    loss: Loss | None
    mean: bool
    emitters: Emitters
    recompile: Recompile
    input_kinds: list[InputKind]
    uncut: set[Hashable]

    def input_kind_of(self, program: Program) -> InputKind:
        """Give the graphs of a program this module's parameters, buffers and children."""
        if program.fused is None or program.signature is None:
            raise PassError("the program was not emitted; run all passes first")
        if program.constants:
            if CONSTANTS not in self._modules:
                self.add_module(CONSTANTS, nn.Module())
            hold_constants(self.get_submodule(CONSTANTS), program.constants)
        return InputKind(
            program,
            program.signature,
            program.signature.key(program.args, program.kwargs),
            attach(program.fused, self, f"Fused{type(program.model).__name__}"),
            tuple(
                attach(graph, self, partition.name)
                for graph, partition in zip(program.submodules, program.partitions, strict=True)
            ),
        )

    @property
    def fused(self) -> fx.GraphModule:
        """The fused graph of the first input kind."""
        return self.input_kinds[0].fused

    @property
    def submodules(self) -> tuple[fx.GraphModule, ...]:
        """The partitions' graphs of the first input kind."""
        return self.input_kinds[0].submodules

    def matching(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[InputKind]:
        """Yield the input kinds that a call may run in; the last one is compiled for this very call.

        Raises:
            InputError: There are too many, or the cuts cannot be found again in a new one.
        """
        if torch.compiler.is_compiling():
            yield self.input_kinds[0]
            return
        for input_kind in tuple(self.input_kinds):
            if input_kind.signature.key(args, kwargs) == input_kind.key:
                yield input_kind
        if len(self.input_kinds) >= MOST_INPUT_KINDS:
            raise InputError(
                f"{type(self.original).__name__} has met {MOST_INPUT_KINDS} kinds of inputs (structures, fixed values, modes), each of "
                f"which is captured apart; pass what changes from call to call as tensors{what_is_read(self.input_kinds)}"
            )
        program = self.recompile(self.program, args, kwargs, len(self.input_kinds))
        self.input_kinds.append(self.input_kind_of(program))
        yield self.input_kinds[-1]

    def forward(
        self, *args: Any, context: Any = None, target: Any = None, reset: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the model.

        Args:
            *args: As the model takes them.
            context: What estimators may see, such as labels [batch]; needed where gradients are recorded.
            target: What the loss compares the output with, where estimators predict the loss (``Critic``, ``Sobolev``): the
                module computes its own ``loss=`` once more for them, without a gradient.
            reset: Where states are cut in time, which examples begin an episode, [batch] and boolean: they start from zero.
            **kwargs: As the model takes them.

        Raises:
            ContextError: There is a context and it was not given, or the other way round.
            InputError: The structure of the inputs is not that of the example.
            EstimatorError: An estimator needs what only a training step sees.
        """
        if self.program.context is None and context is not None:
            kwargs["context"] = context
        if reset is not None and not self.program.recurrences:
            kwargs["reset"] = reset
        if target is not None and not self.foresees:
            kwargs["target"] = target
        blind = self.blind()
        if not torch.is_grad_enabled() or ((self.imagines or self.foresees or blind) and not self.training):
            args, kwargs = without_episodes(self.program, args, kwargs, reset)
            return self.original(*args, **kwargs)
        if blind is not None:
            raise EstimatorError(
                f"the estimator of boundary {blind.name!r} needs the loss or the output's error, which this forward does not see: train "
                "with net.trainer(...).step(x, target=y), and evaluate in eval mode or under torch.no_grad()"
            )
        if self.foresees and (target is None or self.loss is None):
            raise EstimatorError(
                "an estimator of this module predicts the loss, which a forward sees where it knows the target: decouple with loss= and "
                "call net(x, context=y, target=y), or train with net.trainer(...).step(x, target=y); evaluate in eval mode or under "
                "torch.no_grad()"
            )
        seen: tuple[Any, ...] = ()
        if self.program.context is not None:
            if context is None:
                raise ContextError(
                    f"the estimators of this module see a context ({self.program.context.description}); call it as net(x, context=...), "
                    "or under torch.no_grad() for evaluation"
                )
            seen = (context if self.program.context.classes is not None else self.program.context.features(context),)
        if self.program.recurrences:
            refuse_without_trainer(self.program)
            seen = (*seen, reset)
            if not torch.compiler.is_compiling():
                args, kwargs = with_own_tensors(self.program, args, kwargs)
        if self.training or self.program.recurrences or torch.compiler.is_compiling():
            return self.run(args, kwargs, seen, target)
        return self.evaluate(args, kwargs, seen)

    def evaluate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: tuple[Any, ...]) -> Any:
        """Run in evaluation mode: the model itself, where other values cross its cuts than in training (auxiliary heads)."""
        key = self.input_kinds[0].signature.key(args, kwargs)
        if key not in self.uncut:
            try:
                return self.run(args, kwargs, seen)
            except (CutError, InputError) as error:
                self.uncut.add(key)
                warnings.warn(
                    f"in this mode {type(self.original).__name__} runs without its interfaces, and gradients are backpropagation's; "
                    f"to train it in evaluation mode, decouple it in that mode: {error}",
                    stacklevel=4,
                )
        return self.original(*args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: tuple[Any, ...], target: Any = None) -> Any:
        """Run the fused graph of the input kind that a call is in; ``seen`` is what its estimators see beside the inputs.

        Raises:
            InputError: No graph holds for these inputs, and the cuts cannot be found again in a new one.
            CutError: The same.
        """
        for input_kind in self.matching(args, kwargs):
            inputs = (*input_kind.signature.flatten(args, kwargs), *seen)
            if not input_kind.guarded:
                return self.answer(input_kind, inputs, target)
            before = Undo(self.original)
            try:
                return self.answer(input_kind, inputs, target)
            except GuardError:
                before.restore()
        raise InputError("no captured graph holds for these inputs")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save what the module itself holds, and the extra state of the model, whose place it takes."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if has_extra_state(self.original):
            destination[prefix + EXTRA_STATE] = self.original.get_extra_state()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        """Load what the module itself holds, and the extra state of the model."""
        given = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*given)
        key = prefix + EXTRA_STATE
        if not has_extra_state(self.original):
            return
        if key in state_dict:
            self.original.set_extra_state(state_dict[key])
            unexpected_keys[:] = [each for each in unexpected_keys if each != key]
        elif strict:
            missing_keys.append(key)

    def answer(self, input_kind: InputKind, inputs: tuple[Any, ...], target: Any) -> Any:
        """Run the fused graph; tell estimators that predict the loss what it is."""
        if not self.foresees or self.loss is None:
            return input_kind.signature.unflatten(input_kind.fused(*inputs))
        outputs, predictions = input_kind.fused(*inputs)
        with torch.no_grad():
            loss = self.loss(input_kind.signature.unflatten(outputs), target)
        losses = losses_of(loss, len(predictions[0]), self.mean)
        return input_kind.signature.unflatten(tell_losses(outputs, predictions, losses))

    @property
    def foresees(self) -> bool:
        """Whether an estimator predicts the loss, and a forward can be told it."""
        return len(self.program.recurrences) == 0 and any(each.needs_loss for each in self.program.interfaces)

    def blind(self) -> Boundary | None:
        """Return the first boundary whose estimator needs what the fused graph does not see."""
        interfaces, windows = self.program.interfaces, bool(self.program.recurrences)
        return next((each for each in self.boundaries if interfaces[each.index].scheduled_only(windows)), None)

    def train(self, mode: bool = True) -> "DecoupledModule":
        """Set training mode here and on the original model, which shares all children."""
        super().train(mode)
        self.original.training = mode
        return self

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The partitions, in order."""
        return self.program.partitions

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """The boundaries, in the order of their producers."""
        return self.program.boundaries

    @property
    def code(self) -> str:
        """The program as readable Python: the fused forward, every partition, and one training step."""
        return self.emitters.code(self.program, self.mean)

    def to_folder(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a Python package that imports torch alone: model, interfaces, training step and weights.

        Args:
            path: The folder to make; written beside it first, and moved when it is whole.
            overwrite: Replace a folder that is there.
        """
        self.emitters.folder(self, path, overwrite)

    def trainer(
        self,
        optimizer: OptimizerSpec,
        schedule: Any = "sequential",
        *,
        lr_scheduler: SchedulerSpec | None = None,
        estimator_optimizer: OptimizerSpec | None = None,
    ) -> Trainer:
        """Return a trainer that runs one optimizer a partition, after an explicit schedule.

        Args:
            optimizer: From parameters to an optimizer, for all partitions, or a mapping from every partition's name.
            schedule: A name, a text of actions, a Schedule or a source of schedules (``dnifx.schedules``).
            lr_scheduler: From an optimizer to a learning-rate scheduler, stepped after every training step; or a mapping.
            estimator_optimizer: As ``optimizer``, for the estimators by boundary name; the same callable by default.

        Raises:
            LossError: The module was made without ``loss=``.
            OptimizerError: The mapping does not cover the partitions exactly.
        """
        if self.loss is None:
            raise LossError(
                "a trainer needs a loss: give dnifx.decouple(..., loss=...) a callable (output, target) -> scalar or one loss an example"
            )
        return Trainer(self, self.loss, optimizer, schedule, lr_scheduler, estimator_optimizer)

    def interface_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of estimators and input models."""
        in_time = (each.interface for each in self.program.recurrences if each.interface is not None)
        for interface in (*self.program.interfaces, *in_time):
            yield from interface.estimator.parameters()
            if interface.input_model is not None:
                yield from interface.input_model.parameters()

    def __str__(self) -> str:
        return self.emitters.report(self.program)

    def __rich__(self) -> Any:
        return self.emitters.rich(self.program)


def has_extra_state(model: nn.Module) -> bool:
    """Whether a model saves more than its parameters and buffers."""
    return type(model).get_extra_state is not nn.Module.get_extra_state
