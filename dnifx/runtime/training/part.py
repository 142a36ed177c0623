"""One part of a net in training: what it carries from firing to firing, and how a step of it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from dnifx.engines.base import Engine
from dnifx.errors import ContextError, InputError
from dnifx.ir import Program, Schedule
from dnifx.runtime.emitted.finite import Flag, Statistics, either, is_on, not_finite
from dnifx.runtime.emitted.fitting import losses_of
from dnifx.runtime.emitted.ops import GuardError, held
from dnifx.runtime.net.captured import CapturedPart
from dnifx.runtime.net.carried_states import Window
from dnifx.runtime.net.input_kinds import InputKind
from dnifx.runtime.net.labels import check_examples
from dnifx.runtime.net.losses import PartLoss, no_loss
from dnifx.runtime.net.net import Net
from dnifx.runtime.net.refused_inputs import explaining, refuse_inputs
from dnifx.runtime.net.undo import Undo
from dnifx.runtime.training.finite import statistics_of
from dnifx.runtime.training.flight import Flight, corrections_of
from dnifx.runtime.training.holding import Holding
from dnifx.runtime.training.joined import Joined
from dnifx.runtime.training.late import Late, brought
from dnifx.runtime.training.losses import TaskLoss
from dnifx.runtime.training.optimizers import fitted_groups
from dnifx.runtime.training.own_losses import OwnLosses
from dnifx.runtime.training.ownership import Ownership
from dnifx.runtime.training.refusals import refuse_loss_elsewhere, refuse_other_sharing, refuse_scaled_late
from dnifx.runtime.training.scaling import Autocast, device_of
from dnifx.runtime.training.steps import Steps
from dnifx.runtime.training.tied import Tied
from dnifx.runtime.training.updates import Update, UpdateOptions


@dataclass(frozen=True)
class Fired:
    """What one step of a part gives.

    Attributes:
        loss: The loss, detached; None where the schedule left the last partition idle.
        output: The part's output, or None likewise.
        diagnostics: By boundary name, how synthetic gradients compare with their targets.
        skipped: By the name of what is updated, whether its update was not made since a gradient was not finite.
    """

    loss: Tensor | None
    output: Any
    diagnostics: Mapping[str, Mapping[str, Tensor]]
    skipped: Mapping[str, Flag]


class TrainedPart:
    """One part of a net in training.

    Args:
        net: The net.
        captured: The part and its graphs.
        optimizers: The updates of all partitions, by their names in the net.
        estimator_optimizers: Those of all estimators, by boundary key.
        lr_schedulers: By the name or key of the optimizer that each steers.
        own_losses: What partitions train themselves of what they leave on the model.
        options: What is done with gradients, and under what the step runs.
        engine: What carries values between processes.
        holding: Which weights this process holds.

    Attributes:
        steps: How often it has fired.
        own_loss: Its loss, or None.
        window: What lies between its last firing and the next.
        terms: The weighted own losses of the last step, by attribute.
        beside: From the output to what is added to the loss, where gradients come from elsewhere too, or None.
    """

    def __init__(
        self,
        net: Net,
        captured: CapturedPart,
        optimizers: Mapping[str, Update],
        estimator_optimizers: Mapping[str, Update],
        lr_schedulers: Mapping[str, LRScheduler],
        own_losses: OwnLosses,
        options: UpdateOptions,
        engine: Engine,
        holding: Holding,
    ) -> None:
        self.engine, self.holding, self.scaling, self.shards = engine, holding, options.scaling, options.shards
        captured.whole = engine.gathered
        self.cast = Autocast(options.autocast, device_of(net))
        raises = options.on_nonfinite == "raise"
        self.net, self.captured, self.part, self.steps = net, captured, captured.part, 0
        self.program: Program = captured.program
        refuse_scaled_late(self.program, options.autocast is not None or options.scaling is not None)
        self.own_loss: PartLoss | None = net.losses.get(self.part.index)
        refuse_loss_elsewhere(self.own_loss, engine.device_of(len(self.program.partitions) - 1))
        self.terms: dict[str, Tensor] = {}
        self.beside: Callable[[Any], Tensor] | None = None
        names = {each.name: f"submod_{self.part.partitions[each.index]}" for each in self.program.partitions}
        self.optimizers = {own: optimizers[name] for own, name in names.items() if name in optimizers}
        fitted = fitted_groups(self.program, self.program.recurrences)
        self.estimator_optimizers = {key: estimator_optimizers[key] for key in fitted}
        steered = {*names.values(), *self.estimator_optimizers}
        self.lr_schedulers = [each for name, each in lr_schedulers.items() if name in steered]
        self.window, self.late, self.joined = Window(self.program), Late(), Joined()
        mine = [
            each for each in self.program.partitions if engine.ranks is None or engine.ranks[each.index] == engine.rank
        ]
        self.tied = Tied(self.parameter, (name for each in mine for name in each.uses if name not in each.parameters))
        trained = {each.name: each.parameters for each in self.program.partitions}
        self.flight = Flight(self.program.model, trained, corrections_of(self.program))
        known = dict(self.program.model.named_parameters(remove_duplicate=False))
        here = {known[name] for name in self.program.partitions[-1].uses}
        own = self.program.partitions[-1]
        teaches = [known[name] for name in own.parameters] if own.name in self.optimizers else []
        elsewhere: dict[Tensor, str] = {each: name for name, each in known.items() if each not in here}
        self.task = TaskLoss(
            self.own_loss or no_loss, captured.mean, teaches, self.program.batch_dim == 0, raises, elsewhere
        )
        shared = {
            "optimizers": self.optimizers,
            "estimator_optimizers": self.estimator_optimizers,
            "features": self.features,
            "compute_loss": self.cast(self.compute_loss),
            "compute_losses": self.cast(self.compute_losses),
            "factor": self.scaling.factor if self.scaling is not None else None,
            "window": self.window,
            "late": self.late,
            "flight": self.flight,
            "tied": self.tied,
            "ranks": engine,
            "places": engine,
            "parameter": self.parameter,
            "own_losses": own_losses,
            "terms": self.terms,
            "joined": self.joined,
        }
        written = statistics_of(self.program).items()
        updated = holding.names if engine.ranks is not None else {name for name, _ in written}
        self.statistics = Statistics({name: buffers for name, buffers in written if name in updated})
        self.ownership = Ownership(self.program, {name: each.optimizer for name, each in self.optimizers.items()})
        scaled, waits = self.scaling is not None, options.penalty is None and not callable(options.clip)
        self.functions = Steps(
            captured, net.emitters, shared, self.ownership, engine, self.cast, scaled, waits, own_losses, self.shards
        )

    def fire(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: Any,
        context: Any,
        diagnose: bool,
        schedule_of: Callable[[Program], Schedule],
    ) -> Fired:
        """Run one step, with the carried states in its inputs, and keep the states that it leaves.

        Args:
            args: Positional inputs of the part.
            kwargs: Keyword inputs.
            target: What the loss compares the output with.
            context: What estimators see.
            diagnose: Compare every synthetic gradient with its target.
            schedule_of: From the program of an input kind to what the step runs.
        """
        args, kwargs = self.window.filled(args, kwargs)
        self.late.begin(self.steps)
        self.flight.begin(self.steps)
        self.tied.begin(self.steps)
        self.terms.clear()
        updates = {**self.optimizers, **self.estimator_optimizers}
        for each in updates.values():
            each.refused = False
        self.statistics.begin()
        try:
            loss, output, diagnostics = self.run(args, kwargs, target, context, diagnose, schedule_of)
        except BaseException:
            self.statistics.end({name: each.name not in each.turn.updated for name, each in updates.items()}, True)
            if self.scaling is not None:
                self.scaling.break_off()
            raise
        self.net.recorder.found.update({name: dict(found) for name, found in diagnostics.items()})
        refused: dict[str, Flag] = {name: each.refused for name, each in updates.items() if each.refused is not False}
        last = self.engine.device_of(
            len(self.program.partitions) - 1
        )  # where there are several, no device waits for another
        bad, back = either(each for each in refused.values() if last is None or is_on(each, last)), refused
        if self.scaling is not None:
            self.scaling.end()
            if loss is not None:  # a scaled gradient that is too large says nothing of what went forward
                bad = not_finite([loss.detach()])
                back = dict.fromkeys(updates, bad)
        self.statistics.end({**dict.fromkeys(updates, False), **back}, bad)
        if output is not None:
            self.window.leave(output, args, kwargs, bad)
        skipped = {updates[name].name: flag for name, flag in refused.items()}
        return Fired(None if loss is None else loss.detach(), output, diagnostics, skipped)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: Any,
        context: Any,
        diagnose: bool,
        schedule_of: Callable[[Program], Schedule],
    ) -> tuple[Tensor | None, Any, Mapping[str, Any]]:
        """Run one step in the input kind of its inputs; where a guard stops it before any update, in a new one."""
        self.holding.foresee(partial(self.captured.knows, args, kwargs))
        for input_kind in self.captured.matching(args, kwargs, self.holding.bring_foreseen):
            try:
                schedule = schedule_of(input_kind.program)
                late = max(schedule.tied_lag, schedule_of(self.program).tied_lag) > 0
                self.tied.behind |= late
                step = self.functions.training(input_kind, schedule, diagnose, late)
            except InputError as error:
                if not self.captured.steered:
                    raise
                self.captured.warn_of_outcome(error)
                break
            inputs = input_kind.signature.flatten(args, kwargs)
            refuse_inputs(input_kind.program, input_kind.signature.inputs, inputs)
            if self.program.context is not None:
                check_examples(context, inputs, input_kind.program)
            if not input_kind.numbers_hold(inputs):
                continue
            written = (inputs[position] for position in input_kind.written)
            if self.functions.ranks and not self.holds_on_every_rank(input_kind, inputs):
                continue
            if self.engine.ranks is not None and not self.asks_values:
                self.holding.let_go()
            elif self.shards is not None:
                self.shards.divide()
            recorded = self.engine.captures and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            guarded = input_kind.guarded and not recorded  # what is recorded held some steps ago
            before = Undo(self.net, written, self.captured.attributes) if guarded else None
            asked = before is not None and not self.functions.ranks and not input_kind.program.recurrences
            if before is not None and asked and input_kind.has_to_be_asked(inputs):
                holds = input_kind.holds(inputs)
                before.restore()
                if not holds:
                    continue
            try:
                explained = explaining(input_kind.program, input_kind.signature.inputs, inputs)
                with torch.enable_grad(), explained, self.joined.settled():
                    found: tuple[Tensor | None, Any, Mapping[str, Any]] = step(
                        self.functions.names(input_kind), *inputs, target, context
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
        if self.captured.steered and not self.program.recurrences and not self.functions.ranks:
            return self.run_whole(args, kwargs, target)
        raise InputError("no captured graph holds for these inputs")

    @property
    def asks_values(self) -> bool:
        """Whether steps run forward once more, with all weights, to find whether a graph holds for the values of inputs."""
        return any(not each.guards_sizes_alone for each in self.captured.input_kinds)

    def holds_on_every_rank(self, input_kind: InputKind, inputs: tuple[Any, ...]) -> bool:
        """Whether an input kind holds for inputs, as all ranks find alike; nothing changes by looking."""
        if not input_kind.guarded:
            return True
        if not input_kind.known(inputs):
            self.holding.bring_foreseen()
        before = Undo(self.net, (inputs[position] for position in input_kind.written), self.captured.attributes)
        if input_kind.known(inputs):
            holds = True
        else:
            with self.engine.gathered() as at_home:
                holds = input_kind.holds_on_every_rank(at_home(inputs))
        before.restore()
        return holds

    def evaluate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run forward over the ranks; return the output on the last partition's rank, else None.

        Raises:
            InputError: The model cannot be cut in this mode as in training.
        """
        self.holding.foresee(partial(self.captured.knows, args, kwargs))
        for input_kind in self.captured.matching(args, kwargs, self.holding.bring_foreseen):
            inputs = input_kind.signature.flatten(args, kwargs)
            if input_kind.numbers_hold(inputs) and self.holds_on_every_rank(input_kind, inputs):
                if self.net.elsewhere and not self.asks_values:
                    self.holding.let_go()
                if self.tied.behind and self.engine.ranks is not None:
                    refuse_other_sharing(self.program, input_kind.program, range(len(self.program.partitions)))
                with torch.no_grad():
                    made = self.functions.evaluating(input_kind)(self.functions.names(input_kind), *inputs, None)
                self.tied.behind = False
                return made[1]
        raise InputError("no captured graph holds for these inputs")

    def run_whole(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any
    ) -> tuple[Tensor, Any, Mapping[str, Any]]:
        """Run a step of the model itself, by backpropagation: a draw left nothing to cut. The estimators learn nothing."""
        with torch.enable_grad():
            output = self.cast(self.net.original.__call__)(*args, **kwargs)
            task = replace(self.task, elsewhere={})
            raw = self.cast(task.raw)(self.window.visible(output), target, self.steps)
            loss = task.reduced(raw, self.steps)
            loss = loss if self.beside is None else loss + self.beside(output)
            scaled = loss if self.scaling is None else loss * self.scaling.factor()
            torch.autograd.backward(scaled)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return loss, output, {}

    def forget(self) -> None:
        """Drop the gradients that a step left behind where it was broken off, so that the next step does not add to them."""
        for optimizer in (*self.optimizers.values(), *self.estimator_optimizers.values()):
            optimizer.zero_grad()

    def features(self, context: Any) -> Tensor:
        """Return the context's features as the estimators take them."""
        if self.program.context is None:
            raise ContextError("this module has no context")
        return self.program.context.features(context).to(self.program.boundaries[0].specs[0].dtype)

    def parameter(self, path: str) -> Tensor:
        """Return a parameter of the model."""
        found: Tensor = held(self.net.original, *path.split("."))
        return found if self.shards is None else self.shards.leaf(found)

    def compute_loss(self, output: Any, target: Any) -> Tensor:
        """Return the scalar loss of an output, as far as the loss sees it, and what is added to it."""
        loss = self.task.reduced(self.task.raw(self.window.visible(output), target, self.steps), self.steps)
        return loss if self.beside is None else loss + self.beside(output)

    def compute_losses(self, output: Any, target: Any, examples: int) -> tuple[Tensor, Tensor]:
        """Return the scalar loss, and the loss of each example, [examples]: the batch mean where that is all there is."""
        loss = self.task.raw(self.window.visible(output), target, self.steps)
        return self.task.reduced(loss, self.steps), losses_of(loss, examples, self.task.mean)

    def at_home(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is kept for boundaries, partitions or parameters, where each of these is now. Random states stay on the host."""
        homes = {each.name: each.index for each in self.program.partitions}
        homes |= {each.key: each.producer for each in self.program.boundaries}
        homes |= {path: each.index for each in self.program.partitions for path in each.parameters}
        found = {}
        for name, each in kept.items():
            device = self.engine.device_of(homes[name]) if name in homes else None
            found[name] = brought(each, device or device_of(self.net))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what it carries from firing to firing, in attributes of the model too.

        Raises:
            StateError: An attribute holds an object that cannot be copied.
        """
        return {
            "steps": self.steps,
            "adopted": self.ownership.state_dict(),
            "window": self.window.state_dict(),
            "attributes": self.captured.attributes.state_dict(),
            "late": self.late.state_dict(),
            "flight": self.flight.state_dict(),
            "tied": self.tied.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved.

        Raises:
            StateError: It belongs to another part.
        """
        self.window.load_state_dict(state["window"])
        flight = state.get("flight", {"passages": {}, "gradients": {}})
        tied = state.get("tied", {"now": {}, "due": {}})
        self.late.load_state_dict(self.at_home(state["late"]), [each.key for each in self.program.boundaries])
        self.flight.load_state_dict({group: self.at_home(each) for group, each in flight.items()})
        self.tied.load_state_dict({group: self.at_home(each) for group, each in tied.items()})
        self.ownership.load_state_dict(state["adopted"])
        self.captured.attributes.load_state_dict(state["attributes"])
        self.steps = state["steps"]
