"""Probes: how good synthetic gradients are, on a batch or over a whole period, with nothing changed by looking."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import InputError
from dnifx.ir import Interface
from dnifx.runtime.emitted.fitting import compare, per_example
from dnifx.runtime.emitted.ops import GuardError
from dnifx.runtime.emitted.windows import by_example
from dnifx.runtime.net.carried_states import Window
from dnifx.runtime.net.input_kinds import InputKind
from dnifx.runtime.net.net import Net
from dnifx.runtime.net.refused_inputs import explaining
from dnifx.runtime.net.states import without_episodes
from dnifx.runtime.net.undo import Undo
from dnifx.runtime.training.exchange import Exchange
from dnifx.runtime.training.messages import BATCH, message_features
from dnifx.runtime.training.part import TrainedPart
from dnifx.runtime.training.refusals import refuse_late

Diagnostics = Mapping[str, Mapping[str, Tensor]]
"""By boundary name, how an estimate compares with a target, as ``dnifx.runtime.emitted.fitting.compare`` says."""


@dataclass(frozen=True)
class Probe:
    """How good the synthetic gradients are on one batch.

    Attributes:
        loss: The loss, a scalar.
        true: By boundary name, the estimate beside the gradient of backpropagation through the whole model.
        bootstrapped: The estimate beside the gradient that it is fitted to, which contains the estimates further on.
    """

    loss: Tensor
    true: Diagnostics
    bootstrapped: Diagnostics


@dataclass(frozen=True)
class PeriodProbe:
    """How good the synthetic gradients are over a period.

    Attributes:
        losses: By the name of each loss (``"loss"`` where it has none), the loss of each firing, [firings].
        true: By the name of each boundary, inside parts, between them and in time, the estimates of all firings beside the
            gradient of the sum of all losses of the period, backpropagated through all of it.
    """

    losses: Mapping[str, Tensor]
    true: Diagnostics


def probe(part: TrainedPart, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, context: Any) -> Probe:
    """Compare every estimate with its target, true and bootstrapped; weights, buffers, gradients and random state stay."""
    refuse_late(part.program)
    args, kwargs = part.window.filled(args, kwargs)
    for input_kind in part.captured.matching(args, kwargs):
        inputs = input_kind.signature.flatten(args, kwargs)
        try:
            with explaining(input_kind.program, input_kind.signature.inputs, inputs):
                found = [run_probe(part, input_kind, inputs, target, context, true) for true in (True, False)]
        except GuardError:
            continue
        (loss, true_found), (_, bootstrapped) = found
        return Probe(loss.detach(), true_found, bootstrapped)
    raise InputError("no captured graph holds for these inputs")


def run_probe(
    part: TrainedPart, input_kind: InputKind, inputs: tuple[Any, ...], target: Any, context: Any, true: bool
) -> tuple[Tensor, Diagnostics]:
    """Run one of the two steps of a probe."""
    step, names = part.functions.probing(input_kind, true), copy(part.functions.names(input_kind))
    names.unflatten = input_kind.signature.unflatten  # a probe leaves nothing on the model
    with untouched(part.net), torch.enable_grad():
        loss, _, diagnostics = step(names, *inputs, target, context)
    boundaries = [boundary.name for boundary in part.program.boundaries]
    return loss, {name: diagnostics[name] for name in boundaries if name in diagnostics}


@contextmanager
def untouched(net: Net) -> Iterator[None]:
    """Put gradients, buffers and random state back afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    before = Undo(net, attributes=net.whole.attributes)
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        before.restore()


@dataclass(frozen=True)
class Asked:
    """An estimator's answer, and the values that its gradient arrives at.

    Attributes:
        estimates: One for each value, in the estimator's own shapes.
        passed: The values as all that comes later takes them.
        weight: Of an example in the loss.
        dims: For each value of a state, the dimension that counts examples; nothing for other values.
    """

    estimates: tuple[Tensor, ...]
    passed: tuple[Tensor, ...]
    weight: float
    dims: tuple[int, ...] = ()

    def targets(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the per-example targets, in the shapes of the estimates."""
        if self.dims:
            gradients = [by_example(one, dim) for one, dim in zip(gradients, self.dims, strict=True)]
        pairs = zip(gradients, self.estimates, strict=True)
        return [per_example(one, self.weight).reshape(estimate.shape) for one, estimate in pairs]


def probe_period(parts: Sequence[TrainedPart], exchange: Exchange, windows: Sequence[tuple[Any, Any]]) -> PeriodProbe:
    """Compare every estimate of a period with the true gradient; see ``Trainer.probe_period``."""
    period = lcm(*(each.part.every for each in parts))
    if not windows or len(windows) % period:
        raise InputError(
            f"a probe looks at a whole period: got {len(windows)} windows, expected {period} (or a multiple), each a pair (inputs, target)"
        )
    with untouched(exchange.net), torch.enable_grad():
        look = PeriodRun(parts, exchange)
        for number, (inputs, target) in enumerate(windows):
            look.window(number, *call_of(inputs), target)
        return look.result()


def call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a window by position and by keyword."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


class PeriodRun:
    """Runs the windows of a period with all messages and states attached, and asks every estimator on the way.

    Args:
        parts: The parts in training; they stay as they are.
        exchange: What passes between them, attached to what made it.

    Attributes:
        states: What each part carries, attached.
        asked: By boundary name, what its estimator said at each firing.
        ends: By part, what is said of the states that its last firing left: it counts once the part fires again.
        losses: By name, of each firing.
    """

    def __init__(self, parts: Sequence[TrainedPart], exchange: Exchange) -> None:
        self.parts, self.exchange = parts, exchange
        self.states = [Window(each.program) for each in parts]
        for own, part in zip(self.states, parts, strict=True):
            own.states, own.mask = dict(part.window.states), part.window.mask
        self.asked: dict[str, list[Asked]] = {}
        self.ends: dict[int, dict[str, Asked]] = {}
        self.losses: dict[str, list[Tensor]] = {}

    def window(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> None:
        """Run one window."""
        self.exchange.take(self.states, args, kwargs)
        for trained in self.parts:
            if (number + 1) % trained.part.every == 0:
                self.fire(trained, target)

    def fire(self, trained: TrainedPart, target: Any) -> None:
        """Run one firing of a part."""
        part, own, exchange = trained.part, self.states[trained.part.index], self.exchange
        values, states = exchange.call(part, own)
        weight = 1.0 / values[0].size(BATCH) if trained.captured.mean else 1.0
        for name, asked in self.ends.pop(part.index, {}).items():
            self.asked.setdefault(name, []).append(asked)
        args, kwargs = own.filled((values, states), {})
        args, kwargs = without_episodes(trained.program, args, kwargs, own.mask)
        input_kind = next(trained.captured.matching(args, kwargs))
        output = self.run(input_kind, input_kind.signature.flatten(args, kwargs), weight)
        loss = trained.own_loss
        wanted = None if loss is None else loss.target_among(target)
        if loss is not None:
            task = replace(
                trained.task, elsewhere={}
            )  # gradients pass all cuts here, and reach parameters of all partitions
            raw = task.raw(own.visible(output), wanted, trained.steps)
            self.losses.setdefault(loss.name or "loss", []).append(task.reduced(raw, trained.steps))
        exchange.buffers[part.index].clear()
        self.send(trained, output[1], exchange.features(part, wanted))
        self.leave(trained, output[2], weight)

    def run(self, input_kind: InputKind, inputs: Sequence[Any], weight: float) -> Any:
        """Run the partitions of a part one after the other; each boundary's estimator is asked where its values are made."""
        program, made = input_kind.program, ()
        known = dict(zip(input_kind.signature.inputs, inputs, strict=True))
        for partition, module in zip(program.partitions, input_kind.submodules, strict=True):
            made = module(*(known[name] for name in partition.inputs))
            known.update(zip(partition.outputs, made, strict=False))
            for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
                if boundary.producer == partition.index:
                    seen = tuple(known[name].detach() for name in boundary.values)
                    passed = tuple(known[name].view_as(known[name]) for name in boundary.values)
                    known.update(zip(boundary.values, passed, strict=True))
                    self.ask(boundary.name, interface, seen, None, passed, weight)
        return input_kind.signature.unflatten(made)

    def ask(
        self,
        name: str,
        interface: Interface,
        seen: tuple[Tensor, ...],
        features: Tensor | None,
        passed: tuple[Tensor, ...],
        weight: float,
    ) -> None:
        """Ask an estimator, if it answers at all."""
        if interface.fits or interface.blends or not interface.locked:
            estimates = tuple(each.detach() for each in interface.estimator(seen, features))
            self.asked.setdefault(name, []).append(Asked(estimates, passed, weight))

    def send(self, trained: TrainedPart, gives: Sequence[Tensor], features: Tensor | None) -> None:
        """Give the slower parts their messages, one copy each, so that the gradient of one does not mix with another's."""
        part = trained.part
        for buffer in self.exchange.buffers[part.index + 1 :]:
            copies = tuple(value.view_as(value) for value in gives)
            buffer.add(part.index, copies, features)
            for each in self.exchange.sent(part):
                if each.target == buffer.part.index:
                    passed = tuple(copies[place] for place in each.places)
                    seen = tuple(value.detach().flatten(0, BATCH) for value in passed)
                    told = None if features is None else message_features(features, passed[0])
                    weight = self.exchange.weight(each, passed[0].size(BATCH))
                    self.ask(each.boundary.name, self.exchange.interface(each), seen, told, passed, weight)

    def leave(self, trained: TrainedPart, states: Mapping[str, Any], weight: float) -> None:
        """Carry the states that a firing leaves, attached, and ask what stands on them."""
        part, program = trained.part, trained.program
        own = self.states[part.index]
        own.mask = None
        for index, state in enumerate(part.states):
            own.states[index] = pytree.tree_map_only(Tensor, lambda leaf: leaf.view_as(leaf), states[state.key])
        leaves = [leaf for index in range(len(part.states)) for leaf in pytree.tree_leaves(own.states[index])]
        ended = dict(zip(((carry.cut, carry.input) for carry in program.carries), leaves, strict=True))
        self.ends[part.index] = {}
        for each in program.recurrences:
            if each.interface is not None:
                passed = tuple(ended[carry.cut, carry.input] for carry in each.carries)
                dims = tuple(carry.dim for carry in each.carries)
                seen = tuple(by_example(value.detach(), dim) for value, dim in zip(passed, dims, strict=True))
                estimates = tuple(estimate.detach() for estimate in each.interface.estimator(seen))
                self.ends[part.index][each.name] = Asked(estimates, passed, weight, dims)

    def result(self) -> PeriodProbe:
        """Backpropagate through the whole period and compare."""
        total = torch.stack([loss for each in self.losses.values() for loss in each]).sum()
        every = [one for each in self.asked.values() for one in each]
        wanted = [value for one in every for value in one.passed]
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True) if wanted else ())
        targets = {id(one): one.targets([next(found) for _ in one.passed]) for one in every}
        true = {}
        for name, each in self.asked.items():
            estimates = [torch.cat(values) for values in zip(*(one.estimates for one in each), strict=True)]
            true[name] = compare(
                estimates, [torch.cat(values) for values in zip(*(targets[id(one)] for one in each), strict=True)]
            )
        return PeriodProbe({name: torch.stack(each).detach() for name, each in self.losses.items()}, true)
