"""The trainer: one optimizer a partition, driven by an explicit schedule, window by window."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dnifx.engines.base import Engine
from dnifx.errors import InputError
from dnifx.ir import Message, Schedule
from dnifx.runtime.emitted.fitting import compare, fit_gradient
from dnifx.runtime.net.arguments import model_keywords
from dnifx.runtime.net.net import Net
from dnifx.runtime.training.contexts import divided
from dnifx.runtime.training.exchange import Exchange, local_schedule
from dnifx.runtime.training.folders import InFolders
from dnifx.runtime.training.holding import Holding
from dnifx.runtime.training.optimizers import (
    OptimizerSpec,
    SchedulerSpec,
    advance,
    fitted_groups,
    follows_metric,
    make_optimizers,
    make_schedulers,
    shared_callable,
    with_names,
)
from dnifx.runtime.training.over_ranks import refuse_elsewhere, spread_over, told
from dnifx.runtime.training.own_losses import OwnLosses, check_own_losses, with_own_losses
from dnifx.runtime.training.part import TrainedPart
from dnifx.runtime.training.probing import PeriodProbe, Probe, probe, probe_period
from dnifx.runtime.training.recorded import python_reads, refuse_unrecorded
from dnifx.runtime.training.refusals import refuse_refrozen
from dnifx.runtime.training.replicas import Replicas, shards_of, total_of
from dnifx.runtime.training.results import StepResult
from dnifx.runtime.training.saving import saved, take_up
from dnifx.runtime.training.turns import Turn
from dnifx.runtime.training.updates import UpdateOptions, make_updates


class Trainer(InFolders):
    """Runs training steps of a decoupled module after a schedule; made by ``net.trainer(...)``.

    A step is one window. A net without rates is one part that fires in every window; with rates, each part fires when its
    window has come, with the messages that were kept for it.

    Attributes:
        net: The decoupled module.
        steps: How many steps are done.
        optimizers: By partition name; a partition without parameters of its own has none.
        estimator_optimizers: By boundary key, those of estimators and input models.
        lr_schedulers: By the name or key of the optimizer that each steers.
        parts: The parts in training, the one that fires most often first.
        exchange: What passes between the parts; None where there is one.
        own_losses: The weights of the own losses. They may be changed between steps; the names are fixed.
        updates: By the name or key of its optimizer, what is done with gradients before the optimizer takes them.
        turn: Lets one step run at a time, and knows what it has updated.
        metric: Whether a learning-rate scheduler follows a measurement.
        engine: What carries values between processes.
        scaling: What multiplies the loss and divides the gradients, or None.
    """

    def __init__(
        self,
        net: Net,
        optimizer: OptimizerSpec,
        source: Any,
        lr_scheduler: SchedulerSpec | None,
        estimator_optimizer: OptimizerSpec | None,
        own_losses: OwnLosses,
        options: UpdateOptions,
        replicas: Replicas | None,
        engine: Engine,
    ) -> None:
        self.net, self.steps, self.source, self.engine = net, 0, source, engine
        refuse_refrozen(net.program)
        check_own_losses(net.program, own_losses)
        self.own_losses = dict(own_losses)
        with_own_losses(net.program, self.own_losses)
        options = replace(options, total=total_of(replicas, net, engine), shards=shards_of(replicas, net, engine))
        self.accumulate, self.scaling = options.accumulate, options.scaling
        parameters = dict(net.original.named_parameters())
        owned = {
            each.name: [parameters[name] for name in each.parameters] for each in net.partitions if each.parameters
        }
        self.optimizers = make_optimizers(optimizer, with_names(owned, net), "optimizer")
        given = estimator_optimizer if estimator_optimizer is not None else net.make_estimator_optimizer
        default = given if given is not None else shared_callable(optimizer)
        self.estimator_optimizers = make_optimizers(
            default, with_names(fitted_groups(net.program, net.recurrences), net), "estimator_optimizer"
        )
        every = {**self.optimizers, **self.estimator_optimizers}
        refuse_unrecorded(engine, net.program, self.latest, every, options)
        self.lr_schedulers = make_schedulers(lr_scheduler, every, self.optimizers)
        self.metric = any(map(follows_metric, self.lr_schedulers.values()))
        self.turn, self.holding = Turn(), Holding(net, engine, every, options.shards)
        updates, fits = make_updates(net, self.optimizers, self.estimator_optimizers, options, self.turn)
        self.updates = {**updates, **fits}
        shared = updates, fits, self.lr_schedulers, self.own_losses, options, engine, self.holding
        self.parts = tuple(TrainedPart(net, each, *shared) for each in net.parts)
        self.exchange = Exchange(net) if net.program.parts else None
        self._fired: list[TrainedPart] = []
        net.spread = self._spread = spread_over(engine)
        self._local: dict[tuple[Schedule, int], Schedule] = {}

    def step(
        self,
        *args: Any,
        target: Any,
        context: Any = None,
        diagnose: bool = False,
        metric: Any = None,
        gather: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> StepResult:
        """Train on one batch; with several rates, on one window.

        Args:
            *args: The model's inputs; states that are cut in time are carried from step to step where they are not given.
            target: What the loss compares the output with. Where losses have names, a mapping from these, which has to hold
                those of the parts that fire.
            context: What estimators see; the target by default. Where they see none, the model's argument of that name.
            diagnose: Compare every synthetic gradient with its target, where that arrives in this step.
            gather: Over ranks, tell every rank the loss and the diagnostics, for which all wait. Else each rank knows its own.
            metric: What learning-rate schedulers that follow a measurement are stepped with (``ReduceLROnPlateau``); by default the
                loss of this step. Where there is none, the model's argument of that name.
            kwargs: Keyword inputs of the model, by name. One that is called ``target``, ``context``, ``diagnose``, ``metric``,
                ``gather`` or ``kwargs`` belongs here.
            **named: Keyword inputs of the model.

        Raises:
            LossError: The loss cannot be computed from the output and the target, has a wrong form, or is not finite;
                partitions before the loss may have made their update, those that depend on it have not.
            InputError: The inputs are not those of the example's kind.
            RankError: Another rank has failed.
            StateError: Another step of this trainer is running.
            SystemExit: A signal came, and the run was saved (``save_on_signal``).

        An error of a step has a note that says what had been updated before it. The next step goes on from there.
        """
        if metric is not None and not self.metric:
            named["metric"] = metric
        with self.turn.step(self.steps, self.updates.values()):
            result = self.computed(args, target, context, diagnose, model_keywords(named, kwargs))
            if gather or (self.metric and metric is None):
                result = told(self.engine, result, diagnose)
            self.advance(result.loss if self.metric and metric is None else metric)
        self.stop()
        return result

    def compute(
        self,
        *args: Any,
        target: Any,
        context: Any = None,
        diagnose: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> StepResult:
        """Do all of a step that runs on the device: what ``step`` does before ``advance``, with the same arguments.

        A loop of one's own may capture it as a CUDA graph, once a few steps were made as they come, and call ``advance``
        after each replay; the graph is of one schedule and of the learning rates of its time.
        """
        with self.turn.step(self.steps, self.updates.values()):
            return self.computed(args, target, context, diagnose, model_keywords(named, kwargs))

    def computed(
        self, args: tuple[Any, ...], target: Any, context: Any, diagnose: bool, kwargs: dict[str, Any]
    ) -> StepResult:
        """Do what ``compute`` does."""
        context, kwargs = divided(self.net, context, kwargs)
        if self.steps == 0:
            self.forget()
        if self.exchange is not None:
            return self.compute_window(self.exchange, args, kwargs, target, diagnose)
        (part,) = self._fired = list(self.parts)
        self.holding.refuse_blank()
        seen = target if context is None else context
        with self.engine.running(self.steps):
            self.engine.show((args, kwargs, target, context))
            batch, call = (args, kwargs, target, seen), (args, kwargs, diagnose)
            made = self.engine.made(partial(self.fired, part, diagnose), batch, partial(self.python_reads, call))
        loss, output, diagnostics, skipped, terms = made
        self.net.elsewhere, self.net.spread = self.holding.elsewhere, self._spread
        return StepResult(output, {**({} if loss is None else {"loss": loss}), **terms}, diagnostics, skipped)

    def fired(self, part: TrainedPart, diagnose: bool, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run the one part on a batch; return what it gives, and the own losses."""
        args, kwargs, target, seen = batch
        made = part.fire(args, kwargs, target, seen, diagnose, lambda program: self.source.at(self.steps, program))
        return made.loss, made.output, made.diagnostics, made.skipped, dict(part.terms)

    def python_reads(self, call: tuple[Any, ...]) -> Hashable:
        """Return what the Python of a step reads beside its batch."""
        schedule = self.source.at(self.steps, self.net.program)
        return python_reads(self.net, schedule, self.updates, self.own_losses, call)

    def compute_window(
        self, exchange: Exchange, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, diagnose: bool
    ) -> StepResult:
        """Run every part that fires in this window; what was kept for the parts is put back if the step breaks off."""
        schedule = self.source.at(self.steps, self.net.program)
        firing = [each for each in self.parts if self.local(schedule, each).actions]
        targets = [None if each.own_loss is None else each.own_loss.target_among(target) for each in firing]
        before = [(list(buffer.kept), dict(buffer.features)) for buffer in exchange.buffers]
        losses: dict[str, Tensor] = {}
        diagnostics: dict[str, Mapping[str, Tensor]] = {}
        output: list[Any] = [None] * exchange.size
        try:
            exchange.take([each.window for each in self.parts], args, kwargs)
            for part, wanted in zip(firing, targets, strict=True):
                found = self.fire(exchange, part, schedule, wanted, diagnose, output)
                losses.update(found.losses)
                diagnostics.update(found.diagnostics)
        except BaseException:
            for buffer, (kept, features) in zip(exchange.buffers, before, strict=True):
                buffer.kept, buffer.features = kept, features
            raise
        self._fired = firing
        return StepResult(exchange.output(output), losses, diagnostics)

    def fire(
        self,
        exchange: Exchange,
        trained: TrainedPart,
        schedule: Schedule,
        target: Any,
        diagnose: bool,
        output: list[Any],
    ) -> StepResult:
        """Run one firing of a part: its step, what it gives to slower parts, and the targets of what it took."""
        part = trained.part
        values, states = exchange.call(part, trained.window)
        arriving = exchange.arriving(part, values, schedule, diagnose)
        features, sent = exchange.features(part, target), exchange.sent(part)
        trained.beside = (lambda made: exchange.answered(part, made[1], features)) if sent else None
        local = self.local(schedule, trained)
        fired = trained.fire((values, states), {}, target, target, diagnose, lambda _: local)
        results, gives, _ = fired.output
        exchange.send(part, gives, features)
        diagnostics = dict(fired.diagnostics)
        for each in sent:
            if exchange.fits(each, schedule) and not exchange.interface(each).needs_target:
                with torch.enable_grad():
                    estimates = exchange.estimated(each, [gives[place] for place in each.places], features)
                self.fit(each, estimates)
        for each in arriving:
            fitted = exchange.fits(each, schedule) and exchange.interface(each).needs_target
            if fitted or diagnose:
                estimates, arrived = exchange.arrived(each, values)
                if fitted:
                    self.fit(each, estimates, arrived)
                if diagnose:
                    diagnostics[each.boundary.name] = compare(estimates, arrived)
        exchange.buffers[part.index].clear()
        exchange.write(part, trained.window, results, output)
        own = trained.own_loss
        losses = {own.name or "loss": fired.loss} if own is not None and fired.loss is not None else {}
        return StepResult(None, losses, diagnostics)

    def fit(self, each: Message, estimates: Sequence[Tensor], targets: Sequence[Tensor] | None = None) -> None:
        """Update the estimator of messages; without targets, by its own loss."""
        key = each.boundary.key
        made = [torch.ones_like(one) for one in estimates]
        if targets is not None:
            pairs = zip(estimates, targets, strict=True)
            made = [fit_gradient(one.detach(), target, len(one)) for one, target in pairs]
        torch.autograd.backward(tuple(estimates), made)
        self.updates[key].step()
        self.updates[key].zero_grad()
        if self.updates[key].count == 0:
            advance([self.lr_schedulers[key]] if key in self.lr_schedulers else [])

    def local(self, schedule: Schedule, trained: TrainedPart) -> Schedule:
        """Return what a schedule of the net says of one part, in the part's own numbers; made once."""
        key = schedule, trained.part.index
        if key not in self._local:
            self._local[key] = local_schedule(schedule, trained.part.partitions, trained.part.boundaries)
        return self._local[key]

    def advance(self, metric: Any = None) -> None:
        """Let learning rates and the schedule go on by a step.

        Args:
            metric: What schedulers that follow a measurement are stepped with; they wait where there is none.
        """
        for part in self._fired:
            part.steps += 1
            if part.lr_schedulers and part.steps % self.accumulate == 0:
                advance(part.lr_schedulers, metric)
        self.steps += 1

    def probe(
        self,
        *args: Any,
        target: Any,
        context: Any = None,
        kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> Probe:
        """Compare every estimate on a batch with the true gradient and with the target that it is fitted to.

        Weights, buffers, gradients, optimizers and random state are afterwards as they were. States that are cut in time are
        the carried ones; the true gradient is that within the window.

        Args:
            *args: The model's inputs.
            target: What the loss compares the output with.
            context: As ``step`` takes it.
            kwargs: As ``step`` takes them.
            **named: Keyword inputs of the model.

        Raises:
            InputError: The net has several rates, so that a target arrives once in a period.
        """
        if self.exchange is not None:
            raise InputError("the net has several rates: give all windows of a period to trainer.probe_period(windows)")
        refuse_elsewhere(self.net, runs=True)
        context, given = divided(self.net, context, model_keywords(named, kwargs))
        with self.turn.taken():
            return probe(self.parts[0], args, given, target, target if context is None else context)

    def probe_period(self, windows: Sequence[tuple[Any, Any]]) -> PeriodProbe:
        """Compare every estimate over a whole period with the gradient of backpropagation through all of it.

        Weights, buffers, gradients, optimizers, carried states, kept messages and random state are afterwards as they were. The
        period begins with the states that are carried now, and without the messages that are kept; its weights stay. What
        stands on a state is compared at the ends of all windows of its part but the period's last. How the estimates
        compare with what they are fitted to, ``step(..., diagnose=True)`` says.

        Args:
            windows: For each window of the period, in order, a pair of its inputs and its target, as ``step`` takes them: inputs
                are one input, a tuple of positional ones, or a mapping of keyword ones.

        Raises:
            InputError: These are no whole period, or the net has no rates.
            LossError: A target is missing.
        """
        if self.exchange is None:
            raise InputError("the net has no rates, so that a period is one window: use trainer.probe(x, target=y)")
        return probe_period(self.parts, Exchange(self.net, attached=True), windows)

    def reset(self, mask: Tensor | None = None) -> None:
        """Let episodes begin: the carried states of some examples are zero in the next firing of each part.

        The state that was left there gets the target 0, since no loss lies beyond it. Messages of theirs that a slow part has
        not taken yet are lost: it sees zeros in their place, and their target is 0.

        Args:
            mask: Which examples, [batch] and boolean; all by default. After all, the next window may have another number of them.

        Raises:
            InputError: The mask does not fit the state.
        """
        for part in self.parts:
            part.window.reset(mask)
        for buffer in self.exchange.buffers if self.exchange is not None else ():
            buffer.reset(mask)

    def forget(self) -> None:
        """Drop the gradients that a step left behind where it was broken off, so that the next step does not add to them."""
        for part in self.parts:
            part.forget()

    def _repr_html_(self) -> str:
        """Draw the net in a notebook, with the number of steps that are done."""
        return f"<p>Trainer, {self.steps} steps</p>{self.net.emitters.svg(self.net.program, None)}"

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on, in the middle of a period too. Over ranks, every rank calls it and gets the whole."""
        with self.turn.taken():
            self.collect()
            return saved(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateError: It belongs to another trainer, or is damaged; this one is as it was.
        """
        with self.turn.taken():
            self.engine.spread()
            take_up(self, state)
        self.engine.restart(self.latest)
        self.net.elsewhere, self.net.spread = "", spread_over(self.engine)

    @property
    def groups(self) -> dict[str, Mapping[str, Any]]:
        """What is saved by name: optimizers and learning-rate schedulers."""
        return {
            "optimizers": self.optimizers,
            "estimator_optimizers": self.estimator_optimizers,
            "lr_schedulers": self.lr_schedulers,
        }
