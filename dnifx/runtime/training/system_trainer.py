"""The trainer of a system: window by window, each part when it fires, with the messages of the faster ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dnifx.errors import StateError
from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.runtime.emitted.interface import compare, fit_gradient, per_example
from dnifx.runtime.emitted.windows import without_rows
from dnifx.runtime.module.parts import Message, PartPlan
from dnifx.runtime.training.messages import BATCH, Kept, Mail, end_to_end, features_of_each
from dnifx.runtime.training.optimizers import OptimizerSpec, SchedulerSpec, advance, fitted_parameters, make_optimizers
from dnifx.runtime.training.part_loss import nothing
from dnifx.runtime.training.system_optimizers import Makers
from dnifx.runtime.training.system_probing import SystemProbe, probe
from dnifx.runtime.training.system_states import SystemStates
from dnifx.runtime.training.trainer import Trainer

if TYPE_CHECKING:
    from dnifx.runtime.module.system import DecoupledSystem


@dataclass(frozen=True)
class SystemResult:
    """What one window of a system gives.

    Attributes:
        losses: By the name of each loss that was computed, the loss, detached; under ``"loss"`` where there is but one.
        output: The system's output, None in the places of parts that did not fire.
        diagnostics: By boundary name, how the synthetic gradients compare with the targets that arrived in this window.
    """

    losses: Mapping[str, Tensor]
    output: Any
    diagnostics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass
class Told:
    """The source of a part's schedules: what the system's period says of the part in this window."""

    schedule: Schedule
    name: str = "part of a system"
    partial: bool = True

    def at(self, step: int, program: Program) -> Schedule:
        """Return what the part was told."""
        return self.schedule

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the system's own source says all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing over."""


class SystemTrainer:
    """Trains a decoupled system; made by ``net.trainer(...)``.

    Attributes:
        net: The system.
        steps: How many windows are done.
        parts: The trainers of the parts, the fastest first; each counts its own firings.
        message_optimizers: By boundary key, those of the estimators between parts.
    """

    def __init__(
        self,
        net: "DecoupledSystem",
        source: Any,
        optimizer: OptimizerSpec,
        lr_scheduler: SchedulerSpec | None,
        estimator_optimizer: OptimizerSpec | None,
    ) -> None:
        self.net, self.system, self.source, self.steps = net, net.system, source, 0
        makers = Makers.of(net.system, optimizer, lr_scheduler, estimator_optimizer)
        self.told = [Told(program.schedule or Schedule("none", ())) for program in self.system.programs]
        self.parts = [self.part_trainer(plan, makers) for plan in self.system.plans]
        fitted = {each.boundary.key: fitted_parameters(each.interface) for each in self.system.messages}
        fitted = {key: parameters for key, parameters in fitted.items() if parameters}
        chosen = {key: makers.estimators[key] for key in fitted}
        self.message_optimizers = make_optimizers(chosen, fitted, "estimator_optimizer")
        self.message_schedulers = makers.schedulers(self.message_optimizers)
        self.mail = [Mail(plan) for plan in self.system.plans]
        self.states = SystemStates(self.system)
        self.local: dict[tuple[Schedule, int], Schedule] = {}

    def part_trainer(self, plan: PartPlan, makers: Makers) -> Trainer:
        """Make the trainer of a part: its own optimizers, its own loss, and the gradients of its messages beside that."""
        part = self.net.parts[plan.index]
        names = {each.name: f"submod_{plan.partitions[each.index]}" for each in part.partitions if each.parameters}
        trainer = Trainer(
            part,
            self.net.losses.get(plan.index, nothing),
            {name: makers.optimizers[number] for name, number in names.items()},
            self.told[plan.index],
            None,
            makers.estimators_of(plan.index),
        )
        owned = {number: trainer.optimizers[name] for name, number in names.items()}
        trainer.lr_schedulers = makers.schedulers({**owned, **trainer.estimator_optimizers})
        return trainer

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers of the partitions, by the names that schedules know these by."""
        return {
            f"submod_{plan.partitions[each.index]}": trainer.optimizers[each.name]
            for plan, trainer in zip(self.system.plans, self.parts, strict=True)
            for each in trainer.net.partitions
            if each.name in trainer.optimizers
        }

    def features(self, plan: PartPlan, target: Any) -> Tensor | None:
        """Return the features of a firing's context, where estimators of the part's messages see one: of its own target."""
        context = self.system.schedule.context
        sends = any(each.source == plan.index for each in self.system.messages)
        return context.features(target) if context is not None and sends else None

    def answered(self, gives: Sequence[Tensor], sent: Sequence[Message], features: Tensor | None) -> Tensor:
        """Return a zero that, differentiated, gives each message its synthetic gradient."""
        total = torch.zeros((), dtype=gives[sent[0].places[0]].dtype, device=gives[sent[0].places[0]].device)
        for each in sent:
            values = [gives[place] for place in each.places]
            seen = tuple(value.detach().flatten(0, BATCH) for value in values)
            estimates = each.interface.estimator(seen, told(features, values[0]))
            weight = each.scale * self.weight(each, values[0].size(BATCH))
            for value, estimate in zip(values, estimates, strict=True):
                total = total + (value * (estimate.detach() * weight).view_as(value).to(value.dtype)).sum()
        return total - total.detach()

    def weight(self, each: Message, examples: int) -> float:
        """Return the weight of an example in the loss of the part that takes a message."""
        return 1.0 / examples if self.net.parts[each.target].mean else 1.0

    def step(self, *args: Any, target: Any, diagnose: bool = False, **kwargs: Any) -> SystemResult:
        """Train on one window: every part that fires in it, with the messages that were kept for it.

        Args:
            *args: The system's inputs of one window; states that are cut in time are carried where they are not given.
            target: What the loss compares the output with; where losses have names, a mapping from these, which has to hold
                those of the parts that fire.
            diagnose: Compare every synthetic gradient with its target, where it arrives in this window.
            **kwargs: Keyword inputs.

        Raises:
            LossError: A target is missing, or a loss cannot be computed.
            InputError: The inputs are not those of the example's kind.
        """
        schedule = self.source.at(self.steps, self.system.schedule)
        firing = [plan for plan in self.system.plans if self.told_of(schedule, plan).actions]
        own = [self.net.losses.get(plan.index) for plan in firing]
        targets = [None if loss is None else loss.target_among(target) for loss in own]
        flat = self.flat_inputs(args, kwargs)
        before = [mail.held() for mail in self.mail]
        losses: dict[str, Tensor] = {}
        diagnostics: dict[str, Mapping[str, Tensor]] = {}
        output: list[Any] = [None] * self.states.size
        try:
            for mail in self.mail:
                mail.add(None, flat)
            for plan, wanted in zip(firing, targets, strict=True):
                found = self.fire(plan, schedule, wanted, diagnose, output)
                losses.update(found.losses)
                diagnostics.update(found.diagnostics)
        except BaseException:
            for mail, kept in zip(self.mail, before, strict=True):
                mail.hold(kept)
            raise
        self.steps += 1
        return SystemResult(losses, self.states.output(output), diagnostics)

    def fire(self, plan: PartPlan, schedule: Schedule, target: Any, diagnose: bool, output: list[Any]) -> SystemResult:
        """Run one firing of a part: its step, what it gives to slower parts, and the targets of what it took."""
        trainer, mail = self.parts[plan.index], self.mail[plan.index]
        self.told[plan.index].schedule = self.told_of(schedule, plan)
        values = mail.laid_out()
        taken = [each for each in self.system.messages if each.target == plan.index]
        arriving = [each for each in taken if diagnose or Action(Kind.TARGET, each.boundary.index) in schedule.actions]
        for value in (values[number] for each in arriving for number in each.inputs):
            value.requires_grad_()
        features = self.features(plan, target)
        sent = [each for each in self.system.messages if each.source == plan.index]
        trainer.beside = (lambda output: self.answered(output[1], sent, features)) if sent else None
        result = trainer.step(values, self.states.given(plan, trainer.window), target=target, diagnose=diagnose)
        results, gives, _ = result.output
        for slower in self.mail[plan.index + 1 :]:
            slower.add(plan.index, gives, features)
        diagnostics = dict(result.diagnostics)
        for each in sent:
            if fits_by_itself(each, schedule):
                self.fit_by_itself(each, gives, features)
        for each in arriving:
            diagnostics.update(self.arrived(each, values, schedule, diagnose))
        mail.empty()
        for place, value in zip(plan.results, results, strict=True):
            output[place] = value
        self.states.write(plan, trainer.window, output)
        own = self.net.losses.get(plan.index)
        losses = {own.name or "loss": result.loss} if own is not None and result.loss is not None else {}
        return SystemResult(losses, None, diagnostics)

    def told_of(self, schedule: Schedule, plan: PartPlan) -> Schedule:
        """Return what a schedule says of one part, in the part's own numbers; made once."""
        key = schedule, plan.index
        if key not in self.local:
            self.local[key] = local_schedule(schedule, plan.partitions, self.system.places[plan.index])
        return self.local[key]

    def flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the system's inputs in the order of its graph; states that the caller gives go to the parts that carry them."""
        for plan, trainer in zip(self.system.plans, self.parts, strict=True):
            self.states.take(plan, trainer.window, args, kwargs)
        return self.states.flat_inputs(args, kwargs)

    def arrived(
        self, each: Message, values: Sequence[Tensor], schedule: Schedule, diagnose: bool
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Take the targets of all messages that a part took, one an example and message, and fit the estimator to them.

        The target of a message is the gradient of the example's own loss; it is 0 where an episode began since.
        """
        letters = [self.mail[each.target].letters(number) for number in each.inputs]
        examples = values[each.inputs[0]].size(BATCH)
        seen = tuple(end_to_end([letter.value for letter in of]).flatten(0, BATCH) for of in letters)
        targets = tuple(
            target_of(values[number], of, self.weight(each, examples)).flatten(0, BATCH)
            for number, of in zip(each.inputs, letters, strict=True)
        )
        fits = each.interface.needs_target and is_fitted(each, schedule)
        if not fits and not diagnose:
            return {}
        features = self.mail[each.target].features_of(each.source, letters[0])
        with torch.enable_grad():
            estimates = each.interface.estimator(seen, features)
        if fits:
            self.fit(each, estimates, targets)
        return {each.boundary.name: compare(estimates, targets)} if diagnose else {}

    def fit_by_itself(self, each: Message, gives: Sequence[Tensor], features: Tensor | None) -> None:
        """Fit an estimator that learns from no target, to the messages that a part just gave."""
        values = [gives[place].detach() for place in each.places]
        with torch.enable_grad():
            estimates = each.interface.estimator(
                tuple(value.flatten(0, BATCH) for value in values), told(features, values[0])
            )
        self.fit(each, estimates, [torch.zeros_like(one) for one in estimates])

    def fit(self, each: Message, estimates: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Update an estimator."""
        key = each.boundary.key
        made = [fit_gradient(one.detach(), target, len(one)) for one, target in zip(estimates, targets, strict=True)]
        torch.autograd.backward(tuple(estimates), made)
        self.message_optimizers[key].step()
        self.message_optimizers[key].zero_grad()
        advance([self.message_schedulers[key]] if key in self.message_schedulers else [])

    def probe(self, windows: Sequence[tuple[Any, Any]]) -> SystemProbe:
        """Compare every estimate over a whole period with the gradient of backpropagation through all of it.

        Weights, buffers, gradients, optimizers, carried states, kept messages and random state are afterwards as they were. The
        period begins with the states that are carried now, and without the messages that are kept; its weights stay. What
        stands on a state is compared at the ends of all windows of its part but the period's last. How the estimates
        compare with what they are fitted to, ``step(..., diagnose=True)`` says.

        Args:
            windows: For each window of the period, in order, a pair of its inputs and its target, as ``step`` takes them: inputs
                are one input, a tuple of positional ones, or a mapping of keyword ones.

        Raises:
            InputError: These are no whole period.
            LossError: A target is missing.
        """
        return probe(self, windows)

    def reset(self, mask: Tensor | None = None) -> None:
        """Let episodes begin: the carried states of some examples are zero in the next firing of each part.

        Messages of theirs that a slow part has not taken yet are lost: it sees zeros in their place, and their target is 0.

        Args:
            mask: Which examples, [batch] and boolean; all by default.

        Raises:
            InputError: The mask does not fit.
        """
        for trainer, mail in zip(self.parts, self.mail, strict=True):
            trainer.reset(mask)
            mail.reset(mask)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on, in the middle of a period too: what is kept for the slow parts is in it."""
        parts = [trainer.state_dict() for trainer in self.parts]
        return {
            "steps": self.steps,
            "net": self.net.state_dict(),
            "parts": [{name: value for name, value in part.items() if name != "net"} for part in parts],
            "mail": [mail.state_dict() for mail in self.mail],
            "message_optimizers": {key: each.state_dict() for key, each in self.message_optimizers.items()},
            "message_schedulers": {key: each.state_dict() for key, each in self.message_schedulers.items()},
            "schedule": self.source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateError: It belongs to another trainer.
        """
        own: dict[str, Mapping[str, Any]] = {
            "message_optimizers": self.message_optimizers,
            "message_schedulers": self.message_schedulers,
        }
        missing = sorted({"steps", "net", "parts", "mail", "schedule", *own} - set(state))
        if missing or len(state["parts"]) != len(self.parts) or any(set(state[key]) != set(own[key]) for key in own):
            raise StateError(
                f"the saved state is not that of this system (it lacks {', '.join(missing) or 'nothing'}, and has "
                f"{len(state.get('parts', ()))} parts of {len(self.parts)}); make the trainer with the same system, cuts and optimizers"
            )
        try:
            self.net.load_state_dict(state["net"])
        except (KeyError, RuntimeError) as error:
            raise StateError(f"the saved weights do not fit this system: {error}") from error
        for trainer, mail, part, kept in zip(self.parts, self.mail, state["parts"], state["mail"], strict=True):
            trainer.load_state_dict({**part, "net": trainer.net.state_dict()})
            mail.load_state_dict(kept)
        for name, items in own.items():
            for key, item in items.items():
                item.load_state_dict(state[name][key])
        self.source.load_state_dict(state["schedule"])
        self.steps = state["steps"]


def told(features: Tensor | None, message: Tensor) -> Tensor | None:
    """Return the features of each message of a firing, where estimators see a context."""
    return None if features is None else features_of_each(features, message)


def is_fitted(each: Message, schedule: Schedule) -> bool:
    """Whether the estimator of messages learns, and a window says so."""
    return each.interface.fits and Action(Kind.FIT, each.boundary.index) in schedule.actions


def fits_by_itself(each: Message, schedule: Schedule) -> bool:
    """Whether the estimator of messages learns in a window, and from no target."""
    return is_fitted(each, schedule) and not each.interface.needs_target


def target_of(value: Tensor, letters: Sequence[Kept], weight: float) -> Tensor:
    """Return the per-example target of each message, from the gradient that arrived at all of them, end to end."""
    arrived = torch.zeros_like(value) if value.grad is None else value.grad
    parts = torch.split(arrived, [len(letter.value) for letter in letters])
    own = [without_rows(part, letter.lost, BATCH) for part, letter in zip(parts, letters, strict=True)]
    return per_example(end_to_end(own), weight)


def local_schedule(schedule: Schedule, partitions: Sequence[int], boundaries: Sequence[int]) -> Schedule:
    """Return the actions of some partitions and boundaries, numbered among these."""
    on_boundary = (Kind.SYNTHESISE, Kind.TARGET, Kind.FIT)
    found = []
    for action in schedule.actions:
        known = boundaries if action.kind in on_boundary else partitions
        if action.index in known:
            found.append(replace(action, index=list(known).index(action.index)))
    return Schedule(schedule.name, tuple(found))
