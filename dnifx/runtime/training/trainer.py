"""The trainer: one optimizer a partition, driven by an explicit schedule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dnifx.errors import ContextError, InputError, StateError, nearest
from dnifx.ir import Program
from dnifx.runtime.emitted.interface import losses_of
from dnifx.runtime.emitted.ops import GuardError
from dnifx.runtime.module.input_kinds import Undo
from dnifx.runtime.module.states import Window
from dnifx.runtime.training.losses import Loss, TaskLoss
from dnifx.runtime.training.optimizers import (
    OptimizerSpec,
    SchedulerSpec,
    advance,
    fitted_in_time,
    fitted_parameters,
    make_optimizers,
    make_schedulers,
    shared_callable,
)
from dnifx.runtime.training.ownership import Ownership
from dnifx.runtime.training.probing import Probe, probe
from dnifx.runtime.training.steps import Steps

if TYPE_CHECKING:
    from dnifx.runtime.module.decoupled import DecoupledModule


@dataclass(frozen=True)
class StepResult:
    """What a training step gives.

    Attributes:
        loss: The loss, detached; a scalar. None where the schedule left the last partition idle in this step.
        output: The model's output, or None likewise.
        diagnostics: By boundary name, how the synthetic gradient compares with the target; empty unless asked for.
    """

    loss: Tensor | None
    output: Any
    diagnostics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class Trainer:
    """Runs training steps of a decoupled module after a schedule; made by ``net.trainer(...)``.

    Attributes:
        net: The decoupled module.
        steps: How many steps are done.
        optimizers: By partition name; a partition without parameters of its own has none.
        estimator_optimizers: By boundary key, those of estimators and input models.
        lr_schedulers: By the name or key of the optimizer that each steers.
        beside: From the output to what is added to the loss, where gradients come from elsewhere too, or None.
    """

    def __init__(
        self,
        net: "DecoupledModule",
        loss: Loss,
        optimizer: OptimizerSpec,
        schedule: Any,
        lr_scheduler: SchedulerSpec | None,
        estimator_optimizer: OptimizerSpec | None,
    ) -> None:
        self.net = net
        self.steps = 0
        self.beside: Callable[[Any], Tensor] | None = None
        self.source = net.emitters.schedule(schedule, net.program)
        refuse_refrozen(net.program)
        parameters = dict(net.original.named_parameters())
        owned = {
            partition.name: [parameters[name] for name in partition.parameters]
            for partition in net.partitions
            if partition.parameters
        }
        fitted = {
            boundary.key: fitted_parameters(interface)
            for boundary, interface in zip(net.boundaries, net.program.interfaces, strict=True)
            if fitted_parameters(interface)
        }
        fitted.update((each.key, fitted_in_time(each)) for each in net.program.recurrences if fitted_in_time(each))
        self.window = Window(net.program)
        self.optimizers = make_optimizers(optimizer, owned, "optimizer")
        default = estimator_optimizer if estimator_optimizer is not None else shared_callable(optimizer)
        self.estimator_optimizers = make_optimizers(default, fitted, "estimator_optimizer")
        self.lr_schedulers = make_schedulers(
            lr_scheduler, {**self.optimizers, **self.estimator_optimizers}, self.optimizers
        )
        teaches = net.partitions[-1].name in self.optimizers
        self.task = TaskLoss(loss, net.mean, teaches, batch_first=net.program.batch_dim == 0)
        shared = {
            "optimizers": self.optimizers,
            "estimator_optimizers": self.estimator_optimizers,
            "features": self.features,
            "compute_loss": self.compute_loss,
            "compute_losses": self.compute_losses,
            "window": self.window,
            "parameter": net.original.get_parameter,
        }
        self.ownership = Ownership(net.program, self.optimizers)
        self.functions = Steps(net, shared, self.ownership)

    def step(self, *args: Any, target: Any, context: Any = None, diagnose: bool = False, **kwargs: Any) -> StepResult:
        """Train on one batch.

        Args:
            *args: The model's inputs; states that are cut in time are carried from step to step where they are not given.
            target: What the loss compares the output with.
            context: What estimators see; the target by default.
            diagnose: Compare every synthetic gradient with its target.
            **kwargs: The model's keyword inputs.

        Raises:
            LossError: The loss cannot be computed from the output and the target, has a wrong form, or is not finite;
                partitions before the loss may have made their update, those that depend on it have not.
        """
        result = self.compute(*args, target=target, context=context, diagnose=diagnose, **kwargs)
        self.advance()
        return result

    def compute(
        self, *args: Any, target: Any, context: Any = None, diagnose: bool = False, **kwargs: Any
    ) -> StepResult:
        """Do all of a step that runs on the device: what ``step`` does before ``advance``, with the same arguments.

        A loop of one's own may capture it as a CUDA graph, once a few steps were made as they come, and call ``advance``
        after each replay; the graph is of one schedule and of the learning rates of its time.
        """
        if self.net.program.context is None and context is not None:
            raise ContextError(
                "context= was given, but the estimators of this module see none; decouple it with context="
            )
        if self.steps == 0:
            self.forget()
        args, kwargs = self.window.filled(args, kwargs)
        loss, output, diagnostics = self.run(args, kwargs, target, target if context is None else context, diagnose)
        if output is not None:
            self.window.leave(output, args, kwargs)
        return StepResult(None if loss is None else loss.detach(), output, diagnostics)

    def advance(self) -> None:
        """Let learning rates and the schedule go on by a step."""
        if self.lr_schedulers:
            advance(self.lr_schedulers.values())
        self.steps += 1

    def probe(self, *args: Any, target: Any, context: Any = None, **kwargs: Any) -> Probe:
        """Compare every estimate on a batch with the true gradient and with the target that it is fitted to.

        Weights, buffers, gradients, optimizers and random state are afterwards as they were. States that are cut in time are
        the carried ones; the true gradient is that within the window.

        Args:
            *args: The model's inputs.
            target: What the loss compares the output with.
            context: What estimators see; the target by default.
            **kwargs: The model's keyword inputs.
        """
        return probe(self, args, kwargs, target, target if context is None else context)

    def reset(self, mask: Tensor | None = None) -> None:
        """Let episodes begin: the carried states of some examples are zero in the next step.

        The state that was left there gets the target 0, since no loss lies beyond it.

        Args:
            mask: Which examples, [batch] and boolean; all by default.

        Raises:
            InputError: The mask does not fit the state.
        """
        self.window.reset(mask)

    def forget(self) -> None:
        """Drop the gradients that a step left behind where it was broken off, so that the next step does not add to them."""
        for optimizer in (*self.optimizers.values(), *self.estimator_optimizers.values()):
            optimizer.zero_grad()

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, context: Any, diagnose: bool
    ) -> tuple[Tensor | None, Any, Mapping[str, Any]]:
        """Run one step in the input kind of its inputs; where a guard stops it before any update, in a new one."""
        for input_kind in self.net.matching(args, kwargs):
            schedule = self.source.at(self.steps, input_kind.program)
            step = self.functions.training(input_kind, schedule, diagnose)
            inputs = input_kind.signature.flatten(args, kwargs)
            before = Undo(self.net.original) if input_kind.guarded else None
            if before is not None and not input_kind.program.recurrences and input_kind.has_to_be_asked(inputs):
                holds = input_kind.holds(inputs)
                before.restore()
                if not holds:
                    continue
            try:
                with torch.enable_grad():
                    found: tuple[Tensor | None, Any, Mapping[str, Any]] = step(
                        self.functions.parts(input_kind), *inputs, target, context
                    )
                return found
            except GuardError as error:
                self.forget()
                if before is None or input_kind.late_guards:
                    raise InputError(f"a later partition met inputs that it was not captured for: {error}") from error
                before.restore()
            except BaseException:
                self.forget()
                raise
        raise InputError("no captured graph holds for these inputs")

    def features(self, context: Any) -> Tensor:
        """Return the context's features as the estimators take them."""
        program = self.net.program
        if program.context is None:
            raise ContextError("this module has no context")
        return program.context.features(context).to(program.boundaries[0].specs[0].dtype)

    def compute_loss(self, output: Any, target: Any) -> Tensor:
        """Return the scalar loss of an output, as far as the loss sees it, and what is added to it."""
        loss = self.task.reduced(self.task.raw(self.window.visible(output), target, self.steps), self.steps)
        return loss if self.beside is None else loss + self.beside(output)

    def compute_losses(self, output: Any, target: Any, examples: int) -> tuple[Tensor, Tensor]:
        """Return the scalar loss, and the loss of each example, [examples]: the batch mean where that is all there is."""
        loss = self.task.raw(self.window.visible(output), target, self.steps)
        return self.task.reduced(loss, self.steps), losses_of(loss, examples, self.task.mean)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on: step, weights, optimizers, learning rates, schedule."""
        return {
            "steps": self.steps,
            "net": self.net.state_dict(),
            "adopted": self.ownership.state_dict(),
            "optimizers": {name: item.state_dict() for name, item in self.optimizers.items()},
            "estimator_optimizers": {name: item.state_dict() for name, item in self.estimator_optimizers.items()},
            "lr_schedulers": {name: item.state_dict() for name, item in self.lr_schedulers.items()},
            "schedule": self.source.state_dict(),
            "window": self.window.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateError: It belongs to another trainer.
        """
        groups: dict[str, Mapping[str, Any]] = {
            "optimizers": self.optimizers,
            "estimator_optimizers": self.estimator_optimizers,
            "lr_schedulers": self.lr_schedulers,
        }
        missing = sorted({"steps", "net", "schedule"} - set(state))
        if missing:
            raise StateError(f"the saved state lacks {', '.join(missing)}; give what trainer.state_dict() returned")
        for group, items in groups.items():
            if set(state.get(group, ())) != set(items):
                raise StateError(
                    f"the saved state has {group} for {sorted(state.get(group, ()))}, this trainer for {sorted(items)}; "
                    "make the trainer with the same model, cuts and optimizers"
                )
        try:
            self.net.load_state_dict(state["net"])
        except (KeyError, RuntimeError) as error:
            raise StateError(f"the saved weights do not fit this module: {error}") from error
        self.source.load_state_dict(state["schedule"])
        self.window.load_state_dict(state.get("window", {"states": {}, "mask": None}))
        self.ownership.load_state_dict(state.get("adopted", {}))
        for group, items in groups.items():
            for name, item in items.items():
                item.load_state_dict(state[group][name])
        self.steps = state["steps"]


def refuse_refrozen(program: Program) -> None:
    """Raise StateError where parameters were frozen or unfrozen after the module was made: its steps are written for the others."""
    used = {name for partition in program.partitions for name in partition.uses}
    read = {name for name, parameter in program.model.named_parameters() if parameter.requires_grad}
    frozen = sorted(used - read)
    idle = [
        boundary.name
        for boundary, interface in zip(program.boundaries, program.interfaces, strict=True)
        if interface.fits and not any(parameter.requires_grad for parameter in interface.estimator.parameters())
    ]
    if frozen or idle:
        what = f"parameters {nearest('', frozen, 3)}" if frozen else f"the estimators of {nearest('', idle, 3)}"
        raise StateError(
            f"{what} were frozen after dnifx.decouple; freeze first, then decouple (or put requires_grad back)"
        )
