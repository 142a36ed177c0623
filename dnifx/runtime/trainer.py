"""The trainer: one optimizer a partition, driven by an explicit schedule."""

import linecache
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import ContextError, InputError, LossError, StateError, nearest
from dnifx.ir import Program, Schedule
from dnifx.runtime.interface import (
    arrived,
    auxiliary_fit,
    backpropagate,
    by_example,
    compare,
    count_only,
    example_losses,
    fit_gradient,
    losses_of,
    output_error,
    per_example,
    propagated,
    window_gradients,
    window_targets,
    without_rows,
)
from dnifx.runtime.ops import GuardError, guard, guard_length
from dnifx.runtime.optimizers import (
    OptimizerSpec,
    SchedulerSpec,
    advance,
    fitted_in_time,
    fitted_parameters,
    make_optimizers,
    make_schedulers,
    shared_callable,
)
from dnifx.runtime.probing import Probe, probe
from dnifx.runtime.recurrent import Window
from dnifx.runtime.situation import Situation, Undo, owners

if TYPE_CHECKING:
    from dnifx.runtime.module import DecoupledModule

Loss = Callable[[Any, Any], Tensor]
STEP_GLOBALS = {
    "torch": torch,
    "arrived": arrived,
    "auxiliary_fit": auxiliary_fit,
    "backpropagate": backpropagate,
    "by_example": by_example,
    "compare": compare,
    "count_only": count_only,
    "fit_gradient": fit_gradient,
    "output_error": output_error,
    "per_example": per_example,
    "propagated": propagated,
    "window_gradients": window_gradients,
    "window_targets": window_targets,
    "without_rows": without_rows,
}
KEPT_STEPS = 256


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
    """Runs training steps of a decoupled module after a schedule; made by ``net.trainer(...)``."""

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
        self.loss = loss
        self.steps = 0
        self.mean = net.mean
        self.source = net.emitters.schedule(schedule, net.program)
        self.compiled: dict[tuple[int, Schedule, bool], Callable[..., Any]] = {}
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
        self.parts: dict[int, SimpleNamespace] = {}
        self.probes: dict[tuple[int, bool], Callable[..., Any]] = {}

    def bound(self, situation: Situation) -> SimpleNamespace:
        """Return what the generated steps of a situation call by name, gathered once."""
        parts = self.parts.get(id(situation))
        if parts is None:
            parts = SimpleNamespace(
                optimizers=self.optimizers,
                estimator_optimizers=self.estimator_optimizers,
                features=self.features,
                compute_loss=self.compute_loss,
                compute_losses=self.compute_losses,
                unflatten=situation.signature.unflatten,
            )
            for partition, module in zip(situation.program.partitions, situation.submodules, strict=True):
                setattr(parts, partition.name, module)
            for boundary, interface in zip(self.net.boundaries, self.net.program.interfaces, strict=True):
                setattr(parts, f"estimate_{boundary.key}", interface.estimator)
                setattr(parts, f"imagine_{boundary.key}", interface.input_model)
            for each in self.net.program.recurrences:
                setattr(parts, f"estimate_{each.key}", each.interface.estimator if each.interface else None)
                setattr(parts, f"head_{each.key}", each.head)
            parts.window = self.window
            self.parts[id(situation)] = parts
        return parts

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
        advance(self.lr_schedulers.values())
        self.steps += 1
        return StepResult(None if loss is None else loss.detach(), output, diagnostics)

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
        """Run one step in the situation of its inputs; where a guard stops it before any update, in a new one."""
        for situation in self.net.matching(args, kwargs):
            step = self.compile(situation, self.source.at(self.steps, situation.program), diagnose)
            inputs = situation.signature.flatten(args, kwargs)
            before = Undo(self.net.original) if situation.guarded else None
            try:
                with torch.enable_grad():
                    found: tuple[Tensor | None, Any, Mapping[str, Any]] = step(
                        self.bound(situation), *inputs, target, context
                    )
                return found
            except GuardError as error:
                self.forget()
                if before is None or not guards_first(situation.program):
                    raise InputError(f"a later partition met inputs that it was not captured for: {error}") from error
                before.restore()
            except BaseException:
                self.forget()
                raise
        raise InputError("no captured graph holds for these inputs")

    def compile(self, situation: Situation, schedule: Schedule, diagnose: bool) -> Callable[..., Any]:
        """Return the function of a schedule in a situation, generated once."""
        key = (id(situation), schedule, diagnose)
        function = self.compiled.get(key)
        if function is None:
            refuse_strays(self.net.program, situation.program)
            if len(self.compiled) >= KEPT_STEPS:
                self.compiled.pop(next(iter(self.compiled)))
            source = self.net.emitters.step(situation.program, schedule, self.mean, diagnose)
            function = compile_step(source)
            self.compiled[key] = function
        return function

    def compile_probe(self, situation: Situation, true: bool) -> Callable[..., Any]:
        """Return a function of a probe in a situation, generated once."""
        key = (id(situation), true)
        if key not in self.probes:
            self.probes[key] = compile_step(self.net.emitters.probe(situation.program, self.mean, true))
        return self.probes[key]

    def features(self, context: Any) -> Tensor:
        """Return the context's features as the estimators take them."""
        program = self.net.program
        if program.context is None:
            raise ContextError("this module has no context")
        return program.context.features(context).to(program.boundaries[0].specs[0].dtype)

    def compute_loss(self, output: Any, target: Any) -> Tensor:
        """Return the scalar loss of an output; check its form, and on the CPU that it is finite."""
        return self.checked(self.own_loss(output, target))

    def compute_losses(self, output: Any, target: Any, examples: int) -> tuple[Tensor, Tensor]:
        """Return the scalar loss, and the loss of each example, [examples]: the batch mean where that is all there is."""
        loss = self.own_loss(output, target)
        return self.checked(loss), losses_of(loss, examples, self.mean)

    def own_loss(self, output: Any, target: Any) -> Tensor:
        """Return the user's loss as it is, the first one computed with care; it does not see the states."""
        output = self.window.visible(output)
        return self.first_loss(output, target) if self.steps == 0 else self.loss(output, target)

    def checked(self, loss: Tensor) -> Tensor:
        """Return the loss reduced to a scalar, on the CPU made sure to be finite."""
        loss = example_losses(loss, self.mean)
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            raise LossError(
                f"the loss of step {self.steps} is {loss.item()}: nothing that depends on it was updated; look at the inputs and "
                "targets of this batch, or lower the learning rate"
            )
        return loss

    def first_loss(self, output: Any, target: Any) -> Tensor:
        """Compute the loss once with care: turn what it complains of into a LossError, and find out its reduction."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*target size.*different.*")
                loss = self.loss(output, target)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, UserWarning) as error:
            raise LossError(
                f"the loss cannot be computed: {type(error).__name__}: {error}\n  output: {describe(output)}\n  target: "
                f"{describe(target)}\ngive target= in the form that the loss compares with the output"
            ) from error
        if not isinstance(loss, Tensor) or loss.dim() > 1:
            raise LossError(f"the loss gave {describe(loss)}; expected a scalar tensor or one loss an example")
        if not loss.requires_grad and self.net.partitions[-1].name in self.optimizers:
            raise LossError(
                "the loss carries no gradient, so nothing can learn from it: compute it from the output by differentiable operations "
                "(no argmax, no detach, no .item())"
            )
        if self.mean and loss.dim() == 0 and sums(self.loss, loss, output, target):
            raise LossError(
                "the loss sums over examples, but the interfaces were made for a mean: synthetic gradients would be too small by "
                "the batch size; give dnifx.decouple(..., reduction='sum')"
            )
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on: step, weights, optimizers, learning rates, schedule."""
        return {
            "steps": self.steps,
            "net": self.net.state_dict(),
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


def refuse_strays(first: Program, program: Program) -> None:
    """Raise InputError where a situation trains parameters that no optimizer of their partition holds: they would stay as they are."""
    held = owners(first)
    strays = sorted(name for name, index in owners(program).items() if held.get(name) != index)
    if strays:
        raise InputError(
            f"for these inputs the model also trains {', '.join(strays)}, which the partitions of this trainer do not update: decouple "
            "it with an example (args=, kwargs=) for which it uses them, or freeze them"
        )


def guards_first(program: Program) -> bool:
    """Whether every guard runs in the first partition, before anything is updated."""
    return all(
        program.homes[node.name] == 0
        for node in (program.graph.nodes if program.graph is not None else ())
        if node.op == "call_function" and node.target in (guard, guard_length)
    )


def sums(loss: Loss, value: Tensor, output: Any, target: Any) -> bool:
    """Whether a loss doubles, rather than stays, when every example is there twice."""
    twice = [
        pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, item) for item in (output, target)
    ]
    try:
        with torch.no_grad():
            doubled = loss(*twice)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return bool(value != 0) and bool(torch.isclose(doubled, 2 * value, rtol=1e-3, atol=0))


def compile_step(source: str) -> Callable[..., Any]:
    """Compile the source of a step; tracebacks show its lines."""
    name = f"<dnifx step {abs(hash(source)):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = dict(STEP_GLOBALS)
    exec(compile(source, name, "exec"), namespace)
    function: Callable[..., Any] = namespace["step"]
    return function


def describe(value: Any) -> str:
    """Describe a value in an error text."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} of {value.dtype}"
    return type(value).__name__
