"""How the variants of the recipe ``table`` learn: by backpropagation, or cut."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.lr_scheduler import LambdaLR

import dnifx
from dnifx import estimators
from dnifx.zoo.recipes.table_options import Table
from dnifx.zoo.recipes.table_tasks import Task


@dataclass(frozen=True)
class Variant:
    """One way to learn.

    Attributes:
        key: The way, as ``--variants`` names it.
        lr: Learning rate of the network.
        head_lr: Learning rate of heads and estimators.
    """

    key: str
    lr: float
    head_lr: float


def candidates(key: str, settings: Table) -> list[Variant]:
    """Return a variant with every pair of rates that validation chooses from. Without heads the network's are all."""
    plain = key in ("backprop", "zero", "late")
    return [
        Variant(key, lr, head_lr)
        for lr in settings.lr
        for head_lr in ((lr,) if plain or not settings.head_lr else settings.head_lr)
    ]


class TableLearner(ABC):
    """A model and the way it learns from a batch.

    Attributes:
        model: The network.
        net: The network with its cuts.
        task: Has the loss.
    """

    model: nn.Module
    net: dnifx.DecoupledModule
    task: Task

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on a batch and return the mean loss, detached."""

    @abstractmethod
    def all_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return a scalar. Its backward pass gives the network's parameters what they learn from."""

    @property
    @abstractmethod
    def schedule(self) -> dnifx.schedules.Schedule:
        """The actions of a step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""


class Backprop(TableLearner):
    """Backpropagation through the whole network.

    Args:
        net: The network with its cuts. Where its estimators are suffixes, their losses are added to the network's: the
            gradient of each head flows through all that is before it.
        supervised: Whether the heads' losses are added.
        rates: Builds optimizer and schedule of the rates.
        task: Has the loss.
    """

    def __init__(self, net: dnifx.DecoupledModule, supervised: bool, rates: "Rates", task: Task) -> None:
        self.net, self.model, self.supervised, self.task = net, net.original, supervised, task
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters()), "lr": rates.variant.lr}]
        if supervised:
            groups.append({"params": list(net.interface_parameters()), "lr": rates.variant.head_lr})
        self.optimizer = rates.optimizer(groups)
        self.scheduler = rates.scheduler(self.optimizer)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on a batch and return the network's loss, without those of the heads."""
        self.optimizer.zero_grad()
        loss, *others = self._losses(inputs, targets)
        torch.stack([loss, *others]).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    def all_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the network's loss and those of the heads."""
        return torch.stack(self._losses(inputs, targets)).sum()

    def _losses(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the network's loss and those of the heads. All partitions run on each other's values, with their graph."""
        if not self.supervised:
            return [self.task.loss(self.model(inputs), targets)]
        values: dict[str, Any] = {self.net.partitions[0].inputs[0]: inputs}
        for partition, graph in zip(self.net.partitions, self.net.submodules, strict=True):
            outputs = graph(*(values[name] for name in partition.inputs))
            values.update(zip(partition.outputs, outputs, strict=False))
        losses = []
        for interface in self.net.program.interfaces:
            head: Any = interface.estimator
            boundary = self.net.boundaries[interface.boundary]
            head.look()
            seen = [values[name] for name in (*boundary.values, *interface.reads)]
            losses.append(head.loss(head.thin(*seen), targets))
        return [self.task.loss(outputs[0], targets), *losses]

    @property
    def schedule(self) -> dnifx.schedules.Schedule:
        """All partitions forward, then all backward."""
        return dnifx.schedules.backprop(self.net.program)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of network, heads, optimizer and rates."""
        parts: Mapping[str, Any] = {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class Cut(TableLearner):
    """Partitions that learn by themselves, with an optimizer for each and for each estimator.

    Args:
        net: The network with its cuts.
        rates: Builds optimizers and schedules of the rates.
        task: Has the loss.
    """

    def __init__(self, net: dnifx.DecoupledModule, rates: "Rates", task: Task) -> None:
        self.net, self.model, self.task = net, net.original, task
        self.trainer = net.trainer(
            partial(rates.optimizer, lr=rates.variant.lr),
            lr_scheduler=rates.scheduler,
            estimator_optimizer=partial(rates.optimizer, lr=rates.variant.head_lr),
        )

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on a batch and return the last partition's loss."""
        loss = self.trainer.step(inputs, target=targets).loss
        return torch.zeros(()) if loss is None else loss

    def all_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the network's loss. Its backward pass gives the partitions what their estimators answer."""
        given = {"context": targets} if self.net.program.context is not None else {}
        given |= {"target": targets} if self.net.compares else {}
        return self.task.loss(self.net(inputs, **given), targets)

    @property
    def schedule(self) -> dnifx.schedules.Schedule:
        """Each partition learns as soon as its estimator has answered, or from the late gradient of an earlier step."""
        program = self.net.program
        return dnifx.schedules.delayed(dnifx.schedules.sequential(program), program)

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.trainer.load_state_dict(state)


@dataclass(frozen=True)
class Rates:
    """Adam, with rates that grow at first and then fall along a cosine.

    Attributes:
        variant: Has the rates at their highest.
        steps: Steps of the whole run.
        warm_up: Share of the steps in which they grow.
    """

    variant: Variant
    steps: int
    warm_up: float

    def optimizer(self, parameters: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters, or of groups that bring their rates."""
        return torch.optim.Adam(parameters, lr=lr, fused=True)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Return the schedule of an optimizer's rates."""
        return LambdaLR(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return by what the rates are multiplied in a step, counted from 0.

        >>> rates = Rates(Variant("backprop", 1e-3, 1e-3), steps=10, warm_up=0.2)
        >>> [round(rates.factor(step), 2) for step in (0, 1, 6, 10)]
        [0.5, 1.0, 0.5, 0.0]
        """
        growing = round(self.warm_up * self.steps)
        if step < growing:
            return (step + 1) / growing
        return 0.5 + 0.5 * cos(pi * min(1.0, (step - growing) / max(self.steps - growing, 1)))


def learner(settings: Table, variant: Variant, task: Task) -> TableLearner:
    """Return a fresh network with the variant's way of training it."""
    net = decoupled(settings, variant.key, task)
    rates = Rates(variant, settings.steps, settings.warm_up)
    if variant.key in ("backprop", "heads"):
        return Backprop(net, variant.key == "heads", rates, task)
    return Cut(net, rates, task)


def decoupled(settings: Table, key: str, task: Task) -> dnifx.DecoupledModule:
    """Return a fresh network with the variant's estimators on its cuts.

    Its weights depend on the random state alone. The channels of convolutions are innermost, which saves time on a CPU.
    """
    labelled = key in ("linear", "synthetic")
    net = dnifx.decouple(
        task.network(),
        list(settings.cuts or ()),
        args=(task.held_out()[0],),
        gradient=estimator(settings, key),
        context="label" if labelled else None,
        num_classes=task.classes if labelled else None,
        loss=task.loss,
    )
    innermost: dnifx.DecoupledModule = convert_conv2d_weight_memory_format(net, torch.channels_last)
    return innermost


def estimator(settings: Table, key: str) -> Any:
    """Return the factory of the variant's estimators."""
    suffix = partial(estimators.Suffix, blocks=settings.blocks)
    makes: Mapping[str, Any] = {
        "backprop": estimators.Oracle(),
        "heads": suffix(),
        "zero": estimators.Zero(),
        "linear": estimators.LocalLoss(),
        "synthetic": estimators.Synthetic(),
        "suffix": suffix(),
        "shared": suffix(readout="shared", refresh=1),
        "mirrors": suffix(readout="shared", refresh=settings.refresh, decay=settings.decay),
        "late": estimators.Late(settings.late),
    }
    return makes[key]
