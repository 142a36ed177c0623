"""Probes of a system: how good synthetic gradients are over a whole period, with nothing changed by looking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import InputError
from dnifx.ir import Interface
from dnifx.runtime.emitted.interface import compare, per_example
from dnifx.runtime.emitted.windows import by_example
from dnifx.runtime.module.input_kinds import InputKind
from dnifx.runtime.module.parts import PartPlan
from dnifx.runtime.module.states import Window, without_episodes
from dnifx.runtime.training.messages import BATCH, Mail, features_of_each
from dnifx.runtime.training.probing import Diagnostics, untouched

if TYPE_CHECKING:
    from dnifx.runtime.training.system_trainer import SystemTrainer


@dataclass(frozen=True)
class SystemProbe:
    """How good the synthetic gradients of a system are over a period.

    Attributes:
        losses: By the name of each loss (``"loss"`` where it has none), the loss of each firing, [firings].
        true: By the name of each boundary, inside parts, between them and in time, the estimates of all firings beside the
            gradient of the sum of all losses of the period, backpropagated through all of it.
    """

    losses: Mapping[str, Tensor]
    true: Diagnostics


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


def probe(trainer: "SystemTrainer", windows: Sequence[tuple[Any, Any]]) -> SystemProbe:
    """Compare every estimate of a period with the true gradient; see ``SystemTrainer.probe``."""
    period = lcm(*(plan.every for plan in trainer.system.plans))
    if not windows or len(windows) % period:
        raise InputError(
            f"a probe looks at a whole period: got {len(windows)} windows, expected {period} (or a multiple), each a pair (inputs, target)"
        )
    with untouched(trainer.net), torch.enable_grad():
        look = Look(trainer)
        for number, (inputs, target) in enumerate(windows):
            look.window(number, *call_of(inputs), target)
        return look.result()


def call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a window by position and by keyword."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


@dataclass
class Look:
    """Runs the windows of a period with all messages and states attached, and asks every estimator on the way.

    Attributes:
        trainer: What is looked at; it stays as it is.
        mail: What is kept for each part, attached to what made it.
        states: What each part carries, likewise.
        asked: By boundary name, what its estimator said at each firing.
        ends: By part, what is said of the states that its last firing left: it counts once the part fires again.
        losses: By name, of each firing.
    """

    trainer: "SystemTrainer"
    mail: list[Mail] = field(init=False)
    states: list[Window] = field(init=False)
    asked: dict[str, list[Asked]] = field(default_factory=dict, init=False)
    ends: dict[int, dict[str, Asked]] = field(default_factory=dict, init=False)
    losses: dict[str, list[Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.mail = [Mail(plan, attached=True) for plan in self.trainer.system.plans]
        self.states = [Window(part.net.program) for part in self.trainer.parts]
        for own, part in zip(self.states, self.trainer.parts, strict=True):
            own.states, own.mask = dict(part.window.states), part.window.mask

    def window(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any) -> None:
        """Run one window."""
        plans = self.trainer.system.plans
        for plan, own in zip(plans, self.states, strict=True):
            self.trainer.states.take(plan, own, args, kwargs)
        flat = self.trainer.states.flat_inputs(args, kwargs)
        for mail in self.mail:
            mail.add(None, flat)
        for plan in plans:
            if (number + 1) % plan.every == 0:
                self.fire(plan, target)

    def fire(self, plan: PartPlan, target: Any) -> None:
        """Run one firing of a part."""
        part, own = self.trainer.parts[plan.index], self.states[plan.index]
        values = self.mail[plan.index].laid_out()
        weight = 1.0 / values[0].size(BATCH) if part.net.mean else 1.0
        for name, asked in self.ends.pop(plan.index, {}).items():
            self.asked.setdefault(name, []).append(asked)
        args, kwargs = own.filled((values, self.trainer.states.given(plan, own)), {})
        args, kwargs = without_episodes(part.net.program, args, kwargs, own.mask)
        input_kind = next(part.net.matching(args, kwargs))
        output = self.run(input_kind, input_kind.signature.flatten(args, kwargs), weight)
        loss = self.trainer.net.losses.get(plan.index)
        wanted = None if loss is None else loss.target_among(target)
        if loss is not None:
            raw = part.task.raw(own.visible(output), wanted, self.trainer.steps)
            self.losses.setdefault(loss.name or "loss", []).append(part.task.reduced(raw, self.trainer.steps))
        self.mail[plan.index].empty()
        self.send(plan, output[1], self.trainer.features(plan, wanted))
        self.leave(plan, output[2], weight)

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

    def send(self, plan: PartPlan, gives: Sequence[Tensor], features: Tensor | None) -> None:
        """Give the slower parts their messages, one copy each, so that the gradient of one does not mix with another's."""
        for slower in self.mail[plan.index + 1 :]:
            copies = tuple(value.view_as(value) for value in gives)
            slower.add(plan.index, copies, features)
            for each in self.trainer.system.messages:
                if (each.source, each.target) == (plan.index, slower.plan.index):
                    passed = tuple(copies[place] for place in each.places)
                    seen = tuple(value.detach().flatten(0, BATCH) for value in passed)
                    told = None if features is None else features_of_each(features, passed[0])
                    weight = self.trainer.weight(each, passed[0].size(BATCH))
                    self.ask(each.boundary.name, each.interface, seen, told, passed, weight)

    def leave(self, plan: PartPlan, states: Mapping[str, Any], weight: float) -> None:
        """Carry the states that a firing leaves, attached, and ask what stands on them."""
        own, program = self.states[plan.index], self.trainer.parts[plan.index].net.program
        own.mask = None
        for index, state in enumerate(plan.states):
            own.states[index] = pytree.tree_map_only(Tensor, lambda leaf: leaf.view_as(leaf), states[state.key])
        leaves = [leaf for index in range(len(plan.states)) for leaf in pytree.tree_leaves(own.states[index])]
        ended = dict(zip(((carry.cut, carry.input) for carry in program.carries), leaves, strict=True))
        self.ends[plan.index] = {}
        for each in program.recurrences:
            if each.interface is not None:
                passed = tuple(ended[carry.cut, carry.input] for carry in each.carries)
                dims = tuple(carry.dim for carry in each.carries)
                seen = tuple(by_example(value.detach(), dim) for value, dim in zip(passed, dims, strict=True))
                estimates = tuple(estimate.detach() for estimate in each.interface.estimator(seen))
                self.ends[plan.index][each.name] = Asked(estimates, passed, weight, dims)

    def result(self) -> SystemProbe:
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
        return SystemProbe({name: torch.stack(each).detach() for name, each in self.losses.items()}, true)
