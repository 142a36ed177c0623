"""The decoupled module: the user's model with interfaces, to be used in anybody's training loop."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.errors import ContextError, LossError, PassError
from dnifx.ir import CONSTANTS, Boundary, Partition, Program, Schedule
from dnifx.runtime.attach import attach
from dnifx.runtime.trainer import Loss, OptimizerSpec, SchedulerSpec, Trainer


@dataclass(frozen=True)
class Emitters:
    """What a decoupled module asks the compiler for after it was made.

    Attributes:
        report: The program as text for people.
        rich: The program as a rich renderable.
        code: The program as Python; with whether the loss is a mean.
        folder: Writes a module as a package.
        step: The source of a training step, from a schedule, whether the loss is a mean, and whether to diagnose.
        schedule: From a schedule's specification to what gives each step its schedule.
    """

    report: Callable[[Program], str]
    rich: Callable[[Program], Any]
    code: Callable[[Program, bool], str]
    folder: Callable[["DecoupledModule", str | os.PathLike[str], bool], None]
    step: Callable[[Program, Schedule, bool, bool], str]
    schedule: Callable[[Any, Program], Any]


class Constants(nn.Module):
    """Values that a captured graph reads and the model does not hold; tensors move with the module, none are saved."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        for path, value in values.items():
            name = path.removeprefix(f"{CONSTANTS}.")
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)


class DecoupledModule(nn.Module):
    """A model with a Decoupled Neural Interface on every cut; call it as you call the model.

    It holds the model's own children, parameters and buffers under their own names, and the estimators beside them. Outside
    ``torch.no_grad()`` the fused graph runs: same output, and in the backward pass every cut gives its producer the
    synthetic gradient and its estimator the target. Under ``torch.no_grad()`` the original model runs; so it does in
    evaluation mode where there are synthetic inputs, which serve training alone.

    Args:
        program: A program that went through all passes.
        loss: The loss of the trainer: (output, target) to a scalar or one loss an example.
        mean: Whether the loss averages over examples (else it sums).
        roots: The attributes that hold the estimators and the input models.
        emitters: The compiler's back ends.
    """

    def __init__(
        self, program: Program, loss: Loss | None, mean: bool, roots: tuple[str, str], emitters: Emitters
    ) -> None:
        super().__init__()
        self.__dict__["original"] = program.model
        self.__dict__["program"] = program
        self.__dict__["_parameters"] = program.model._parameters
        self.__dict__["_buffers"] = program.model._buffers
        self.__dict__["_non_persistent_buffers_set"] = program.model._non_persistent_buffers_set
        self._modules.update(program.model._modules)
        estimators = {b.key: i.estimator for b, i in zip(program.boundaries, program.interfaces, strict=True)}
        self.add_module(roots[0], nn.ModuleDict(estimators))
        imagined = {
            boundary.key: interface.input_model
            for boundary, interface in zip(program.boundaries, program.interfaces, strict=True)
            if interface.input_model is not None
        }
        if imagined:
            self.add_module(roots[1], nn.ModuleDict(imagined))
        self.imagines = bool(imagined)
        if program.constants:
            self.add_module(CONSTANTS, Constants(program.constants))
        self.training = program.model.training
        self.__dict__.update(loss=loss, mean=mean, emitters=emitters)
        if program.fused is None:
            raise PassError("the program was not emitted; run all passes first")
        self.__dict__["fused"] = attach(program.fused, self, f"Fused{type(program.model).__name__}")
        self.__dict__["submodules"] = tuple(
            attach(graph, self, partition.name)
            for graph, partition in zip(program.submodules, program.partitions, strict=True)
        )

    original: nn.Module
    program: Program
    fused: fx.GraphModule
    submodules: tuple[fx.GraphModule, ...]
    loss: Loss | None
    mean: bool
    emitters: Emitters

    def forward(self, *args: Any, context: Any = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            *args: As the model takes them.
            context: What estimators may see, such as labels [batch]; needed where gradients are recorded.
            **kwargs: As the model takes them.

        Raises:
            ContextError: There is a context and it was not given, or the other way round.
            InputError: The structure of the inputs is not that of the example.
        """
        if self.program.context is None and context is not None:
            kwargs["context"] = context
        if not torch.is_grad_enabled() or (self.imagines and not self.training):
            return self.original(*args, **kwargs)
        signature = self.program.signature
        if signature is None:
            raise PassError("the program has no signature; run all passes first")
        inputs = signature.flatten(args, kwargs)
        if self.program.context is not None:
            if context is None:
                raise ContextError(
                    f"the estimators of this module see a context ({self.program.context.description}); call it as net(x, context=...), "
                    "or under torch.no_grad() for evaluation"
                )
            seen = self.program.context
            inputs = (*inputs, context if seen.classes is not None else seen.features(context))
        return signature.unflatten(self.fused(*inputs))

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
        for interface in self.program.interfaces:
            yield from interface.estimator.parameters()
            if interface.input_model is not None:
                yield from interface.input_model.parameters()

    def __str__(self) -> str:
        return self.emitters.report(self.program)

    def __rich__(self) -> Any:
        return self.emitters.rich(self.program)
