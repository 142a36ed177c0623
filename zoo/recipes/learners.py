"""The ways a feed-forward network learns: backprop, and every kind of interface."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

import dnifx
from dnifx.zoo.cnn import CNN
from dnifx.zoo.data import DATASETS
from dnifx.zoo.fcn import FCN
from dnifx.zoo.recipes.settings import Settings
from dnifx.zoo.recipes.training import Learner

CUTS = "hidden.*"

_NAMES = {
    ("backprop", "none"): "backprop",
    ("zero", "none"): "no gradient",
    ("stale", "none"): "stale gradient",
    ("synthetic", "none"): "DNI",
    ("synthetic", "label"): "cDNI",
    ("oracle", "none"): "true gradient",
}


@dataclass(frozen=True)
class Arm:
    """One way to train the network.

    Attributes:
        gradient: What the hidden layers learn from: ``backprop``, or the name of an estimator.
        context: What the estimators see beside the activation: ``none`` or ``label``.
    """

    gradient: str
    context: str = "none"

    @property
    def name(self) -> str:
        """As tables show it."""
        return _NAMES[self.gradient, self.context]

    @property
    def key(self) -> str:
        """As files are named."""
        return self.gradient if self.context == "none" else f"{self.gradient}-{self.context}"


def arms(settings: Settings) -> tuple[Arm, ...]:
    """Return the arms that the settings ask for: synthetic gradients once for each context, the others once."""
    found = [
        Arm(gradient, context)
        for gradient in settings.gradient
        for context in (settings.context if gradient == "synthetic" else ("none",))
    ]
    return tuple(dict.fromkeys(found))


def network(settings: Settings) -> nn.Module:
    """Return the network that the options ask for, with fresh weights."""
    dataset = DATASETS[settings.data]
    if settings.net == "cnn":
        return CNN(dataset.shape, dataset.classes, settings.layers, settings.width)
    return FCN(torch.Size(dataset.shape).numel(), dataset.classes, settings.layers, settings.width)


def decoupled(settings: Settings, arm: Arm, model: nn.Module, example: Tensor) -> dnifx.DecoupledModule:
    """Return the network with the arm's interface after every hidden layer."""
    labelled = arm.context == "label"
    return dnifx.decouple(
        model,
        CUTS,
        args=(example,),
        gradient=_estimator(settings, arm),
        context="label" if labelled else None,
        num_classes=DATASETS[settings.data].classes if labelled else None,
        loss=functional.cross_entropy,
    )


def learner(settings: Settings, arm: Arm, example: Tensor) -> Learner:
    """Return a fresh network and the arm's way of training it.

    Args:
        settings: What is trained.
        arm: The arm.
        example: Inputs of a batch, on the device to train on.
    """
    model = network(settings).to(example.device)
    optimizer = partial(torch.optim.Adam, lr=settings.lr)
    scheduler = partial(MultiStepLR, milestones=_milestones(settings), gamma=0.1)
    if arm.gradient == "backprop":
        return LoopLearner(model, model, optimizer, scheduler)
    net = decoupled(settings, arm, model, example)
    if settings.target == "fused":
        return LoopLearner(model, net, optimizer, scheduler, labelled=arm.context == "label")
    return TrainerLearner(model, net, optimizer, scheduler)


class LoopLearner(Learner):
    """Anybody's training loop: forward, loss, backward, one optimizer.

    Args:
        model: The network.
        module: What is called: the network, or the fused module made of it.
        optimizer: Builds the optimizer of the module's parameters.
        scheduler: Builds the learning rate's schedule.
        labelled: Whether the module takes the label as its context.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], MultiStepLR],
        labelled: bool = False,
    ) -> None:
        self.model = model
        self._module = module
        self._optimizer = optimizer(module.parameters())
        self._scheduler = scheduler(self._optimizer)
        self._labelled = labelled

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on a batch and return its mean loss."""
        self._optimizer.zero_grad()
        output = self._module(inputs, context=targets) if self._labelled else self._module(inputs)
        loss = functional.cross_entropy(output, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._scheduler.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the module, the optimizer and the learning rate's schedule."""
        return {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])


class TrainerLearner(Learner):
    """The scheduled trainer: one optimizer for each partition and for each estimator.

    Args:
        model: The network.
        net: The decoupled network.
        optimizer: Builds an optimizer.
        scheduler: Builds a learning rate's schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        net: dnifx.DecoupledModule,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], MultiStepLR],
    ) -> None:
        self.model = model
        self._trainer = net.trainer(optimizer, lr_scheduler=scheduler)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on a batch and return its mean loss, where the schedule came to it."""
        return self._trainer.step(inputs, target=targets).loss

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state."""
        return self._trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self._trainer.load_state_dict(state)


def _estimator(settings: Settings, arm: Arm) -> Any:
    if arm.gradient != "synthetic":
        return arm.gradient
    hidden = settings.hidden_label if arm.context == "label" else settings.hidden
    return dnifx.estimators.Synthetic(hidden=hidden, width=settings.estimator_width)


def _milestones(settings: Settings) -> list[int]:
    return [round(share * settings.steps) for share in settings.lr_drops]
