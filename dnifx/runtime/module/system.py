"""A decoupled system: parts that fire at different rates, and what stands on the messages between them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnifx.errors import ContextError, DnifxError, InputError, LossError
from dnifx.ir import Boundary, Partition, Program
from dnifx.runtime.module.decoupled import DecoupledModule, Emitters
from dnifx.runtime.module.parts import System
from dnifx.runtime.training.optimizers import OptimizerSpec, SchedulerSpec
from dnifx.runtime.training.part_loss import PartLoss
from dnifx.runtime.training.system_trainer import SystemTrainer


class DecoupledSystem(nn.Module):
    """A system whose parts fire at different rates; ``net.trainer(...)`` trains it, window by window.

    Under ``torch.no_grad()`` it is called as the original, for any number of windows.

    Args:
        system: The parts and the messages between them.
        losses: By part, what its outputs are compared by.
        mean: Whether gradients are means over examples (else sums) in parts without a loss of their own.
        root: The attribute that holds the estimators.
        emitters: The compiler's back ends.
        report: The system for people: as text by ``str``, and for rich.
        period: From a schedule's specification to what gives each window its schedule.
    """

    def __init__(
        self,
        system: System,
        losses: Mapping[int, PartLoss],
        mean: bool,
        root: str,
        emitters: Emitters,
        report: Callable[[System], Any],
        period: Callable[[Any, Program], Any],
    ) -> None:
        super().__init__()
        model = system.whole.model
        for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[registry] = model.__dict__[registry]
        self._modules.update(model._modules)
        self.__dict__.update(original=model, system=system, losses=dict(losses), emitters=emitters)
        self.__dict__.update(report=report, period=period)
        self.training = model.training
        self.__dict__["parts"] = tuple(self.part(index, mean, root) for index in range(len(system.plans)))
        estimators = {each.boundary.key: each.interface.estimator for each in system.messages}
        for part in self.parts:
            estimators.update(part.get_submodule(root).named_children())
        self.add_module(root, nn.ModuleDict(estimators))

    original: nn.Module
    system: System
    losses: dict[int, PartLoss]
    emitters: Emitters
    parts: tuple[DecoupledModule, ...]

    def part(self, index: int, mean: bool, root: str) -> DecoupledModule:
        """Return a part as a decoupled module."""
        mean = self.losses[index].mean if index in self.losses else mean
        return DecoupledModule(
            self.system.programs[index], None, mean, (root, root), self.emitters, refuse_other_inputs
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original, where no gradients are recorded.

        Raises:
            DnifxError: Gradients are recorded.
        """
        if torch.is_grad_enabled():
            raise DnifxError(
                "a system decoupled with every= has no fused forward: its slow parts fire once in several calls. Train it with "
                "net.trainer(...).step(...), and evaluate under torch.no_grad(); to train all of it jointly, call the original"
            )
        return self.original(*args, **kwargs)

    def train(self, mode: bool = True) -> "DecoupledSystem":
        """Set training mode here, on the original and on the parts."""
        super().train(mode)
        self.original.training = mode
        for part in self.parts:
            part.train(mode)
        return self

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The partitions, as schedules number them."""
        return self.system.schedule.partitions

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """The boundaries inside parts, then those between them, as schedules number them."""
        return self.system.schedule.boundaries

    @property
    def program(self) -> Program:
        """All partitions and boundaries, as schedules take them."""
        return self.system.schedule

    @property
    def code(self) -> str:
        """The parts as readable Python, the fastest first."""
        texts = []
        for plan, part in zip(self.system.plans, self.parts, strict=True):
            texts.append(f"# every {plan.every}: one firing\n{self.emitters.code(part.program, part.mean)}")
        return "\n\n".join(texts)

    def to_folder(self, path: Any, overwrite: bool = False) -> None:
        """Refuse: an emitted package runs one step of one rate.

        Raises:
            DnifxError: Always.
        """
        raise DnifxError(
            "a system decoupled with every= cannot be written to a folder: a package runs one step, and its messages are kept over "
            "several; train it here, and write the trained original with its own tools"
        )

    def trainer(
        self,
        optimizer: OptimizerSpec,
        schedule: Any = "sequential",
        *,
        lr_scheduler: SchedulerSpec | None = None,
        estimator_optimizer: OptimizerSpec | None = None,
    ) -> SystemTrainer:
        """Return a trainer that runs one window a step, with one optimizer a partition.

        Args:
            optimizer: From parameters to an optimizer, for all partitions, or a mapping from every partition's name.
            schedule: ``"sequential"``, a ``dnifx.schedules.Period``, or its text: the windows of a period with bars between.
            lr_scheduler: From an optimizer to a learning-rate scheduler, stepped at every firing of its part.
            estimator_optimizer: As ``optimizer``, for the estimators by boundary name; the same callable by default.

        Raises:
            LossError: The system was made without ``loss=``.
            ContextError: Estimators see a context, and a part that sends messages has no loss, and so no target.
            OptimizerError: The mapping does not cover the partitions exactly.
        """
        if not self.losses:
            raise LossError(
                "a trainer needs a loss: give dnifx.decouple(..., loss=...) a callable, or one for each part by the name of its module"
            )
        self.check_context()
        source = self.period(schedule, self.system.schedule)
        return SystemTrainer(self, source, optimizer, lr_scheduler, estimator_optimizer)

    def check_context(self) -> None:
        """Raise ContextError where no target would be there for the context of a message."""
        for each in self.system.messages:
            if self.program.context is not None and each.source not in self.losses:
                name = self.partitions[each.boundary.producer].name
                raise ContextError(
                    f"context= ({self.program.context.description}) is made of the target of the part that sends a message, and {name}, "
                    f"which sends {each.boundary.name!r}, has no loss, and so no target: give its part one too, loss={{...}} by the path "
                    "of a module in it, or leave context= out"
                )

    period: Callable[[Any, Program], Any]
    report: Callable[[System], Any]

    def interface_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of all estimators."""
        for part in self.parts:
            yield from part.interface_parameters()
        for each in self.system.messages:
            yield from each.interface.estimator.parameters()

    def __str__(self) -> str:
        return str(self.report(self.system))

    def __rich__(self) -> Any:
        return self.report(self.system)


def refuse_other_inputs(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Program:
    """Raise InputError: a part holds for the inputs and modes that it was captured for."""
    shapes = ", ".join(str(tuple(value.shape)) for value in args[0] if isinstance(value, Tensor))
    raise InputError(
        f"a part of the system was captured for other inputs or another mode (it now takes {shapes}): decouple the system again, with "
        "an example of this call and in this mode"
    )
