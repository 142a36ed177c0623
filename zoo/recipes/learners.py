"""The ways a feed-forward network learns: backprop, and every kind of interface."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.lr_scheduler import MultiStepLR

import dnifx
from dnifx import estimators
from dnifx.zoo.cnn import CNN
from dnifx.zoo.data import DATASETS
from dnifx.zoo.fcn import FCN
from dnifx.zoo.recipes.arms import Arm
from dnifx.zoo.recipes.diagnosis import Comparison
from dnifx.zoo.recipes.settings import Settings
from dnifx.zoo.recipes.training import Learner

PER_EXAMPLE = frozenset({"critic", "sobolev"})
"""Gradients that learn from the loss of each example."""

PROP_ALPHA = 0.01
"""Weight of the ``prop`` term."""

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], MultiStepLR]
M = TypeVar("M", bound=nn.Module)


def network(settings: Settings, layers: int) -> nn.Module:
    """Return the network that the options ask for, with fresh weights."""
    dataset = DATASETS[settings.data]
    if settings.net == "cnn":
        return _channels_last(CNN(dataset.shape, dataset.classes, layers, settings.width))
    return FCN(torch.Size(dataset.shape).numel(), dataset.classes, layers, settings.width)


def decoupled(settings: Settings, arm: Arm, model: nn.Module, example: Tensor) -> dnifx.DecoupledModule:
    """Return the network with the arm's interfaces: after every hidden layer, or after one."""
    labelled = arm.context == "label"
    unlocked = estimators.SyntheticInput(hidden=1, width=settings.estimator_width)
    net = dnifx.decouple(
        model,
        "hidden.*" if arm.position is None else f"hidden.{arm.position - 1}",
        args=(example,),
        gradient=estimator(settings, arm),
        inputs=unlocked if settings.schedule == "unlocked" else None,
        context="label" if labelled else None,
        num_classes=DATASETS[settings.data].classes if labelled else None,
        loss=partial(functional.cross_entropy, reduction="none" if arm.gradient in PER_EXAMPLE else "mean"),
    )
    return _channels_last(net)


def estimator(settings: Settings, arm: Arm) -> Any:
    """Return what makes the arm's estimators."""
    synthetic = estimators.Synthetic(hidden=arm.hidden or 0, width=settings.estimator_width)
    head = estimators.Head(hidden=arm.hidden or 0, width=settings.estimator_width)
    makes: Mapping[str, Any] = {
        "synthetic": synthetic,
        "bplambda": estimators.BPLambda(estimator=synthetic),
        "prop": estimators.Prop(alpha=PROP_ALPHA, estimator=synthetic),
        "critic": estimators.Critic(head),
        "sobolev": estimators.Sobolev(head=head),
        "local_loss": estimators.LocalLoss(head),
        "stale": estimators.Stale(0.9 if arm.decay is None else arm.decay),
    }
    return makes.get(arm.gradient, arm.gradient)


def learner(settings: Settings, arm: Arm, example: Tensor, seed: int = 0) -> Learner:
    """Return a fresh network and the arm's way of training it.

    Args:
        settings: What is trained.
        arm: The arm, with everything chosen.
        example: Inputs of a batch, on the device to train on.
        seed: Draws the schedule, where it is drawn.
    """
    model = network(settings, arm.layers or settings.layers[0]).to(example.device)
    rate = settings.lr[0] if arm.lr is None else arm.lr
    optimizer = _adam(rate, example.device)
    estimator_optimizer = _adam(rate if arm.estimator_lr is None else arm.estimator_lr, example.device)
    scheduler = partial(MultiStepLR, milestones=_milestones(settings), gamma=0.1)
    if arm.gradient == "backprop":
        return LoopLearner(model, model, optimizer, scheduler)
    net = decoupled(settings, arm, model, example)
    if settings.target == "fused":
        interface_lr = estimator_optimizer.keywords["lr"]
        prober = net.trainer(optimizer)
        return LoopLearner(model, net, optimizer, scheduler, interface_lr, arm.context == "label", prober)
    schedule = "sequential" if arm.p is None else f"{settings.schedule}{{p={arm.p!r},seed={seed}}}"
    trainer = net.trainer(optimizer, schedule, lr_scheduler=scheduler, estimator_optimizer=estimator_optimizer)
    return TrainerLearner(model, trainer)


class LoopLearner(Learner):
    """Anybody's training loop: forward, loss, backward, one optimizer.

    Args:
        model: The network.
        module: What is called: the network, or the fused module made of it.
        optimizer: Builds the optimizer of the module's parameters.
        scheduler: Builds the learning rate's schedule.
        interface_lr: Learning rate of what the module has beside the network's parameters.
        labelled: Whether the module takes the label as its context.
        prober: A trainer of the fused module, which only compares; None where there are no synthetic gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler,
        interface_lr: float = 0.0,
        labelled: bool = False,
        prober: dnifx.Trainer | None = None,
    ) -> None:
        self.model = model
        self._prober = prober
        self._module = module
        own = list(model.parameters())
        known = {id(parameter) for parameter in own}
        others = [parameter for parameter in module.parameters() if id(parameter) not in known]
        groups = [{"params": own}, {"params": others, "lr": interface_lr}]
        self._optimizer = optimizer(groups if others else own)
        self._scheduler = scheduler(self._optimizer)
        self._labelled = labelled

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on a batch and return its mean loss."""
        self._optimizer.zero_grad()
        loss = self._loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.detach()

    def diagnosed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Comparison]:
        """Compare, then train on the batch: in the fused module the gradients that arrive are seen by nobody."""
        found = {} if self._prober is None else self._prober.probe(inputs, target=targets).bootstrapped
        return self.step(inputs, targets), found

    def probe(self, inputs: Tensor, targets: Tensor) -> Comparison:
        """Compare with the true gradient, and change nothing."""
        return {} if self._prober is None else self._prober.probe(inputs, target=targets).true

    def advance(self) -> None:
        """Let the learning rate go on by a step."""
        self._scheduler.step()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The one optimizer."""
        return [self._optimizer]

    def compiled(self) -> "LoopLearner":
        """Return the same learner, its forward pass and loss compiled by ``torch.compile``."""
        twin = copy.copy(self)
        twin._loss = torch.compile(self._loss)  # type: ignore[method-assign]
        return twin

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        output = self._module(inputs, context=targets) if self._labelled else self._module(inputs)
        return functional.cross_entropy(output, targets)

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
        trainer: The trainer of the decoupled network.
    """

    def __init__(self, model: nn.Module, trainer: dnifx.Trainer) -> None:
        self.model = model
        self._trainer = trainer

    def diagnosed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Comparison]:
        """Train on a batch, and compare the synthetic gradients with those that arrive in this step."""
        result = self._trainer.step(inputs, target=targets, diagnose=True)
        return result.loss, result.diagnostics

    def probe(self, inputs: Tensor, targets: Tensor) -> Comparison:
        """Compare with the true gradient, and change nothing."""
        return self._trainer.probe(inputs, target=targets).true

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Do all of a step that runs on the device; return its mean loss, where the schedule came to it."""
        return self._trainer.compute(inputs, target=targets).loss

    def advance(self) -> None:
        """Let the learning rates and the schedule go on by a step."""
        self._trainer.advance()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the partitions and of the estimators."""
        return [*self._trainer.optimizers.values(), *self._trainer.estimator_optimizers.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state."""
        return self._trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self._trainer.load_state_dict(state)


def _adam(rate: float, device: torch.device) -> "partial[torch.optim.Adam]":
    """Return what makes an Adam that a CUDA graph can hold; fused, it takes a third of the time."""
    return partial(torch.optim.Adam, lr=rate, fused=True, capturable=device.type == "cuda")


def _channels_last(module: M) -> M:
    """Put the channels of its convolutions innermost: on a CPU they, and the pools, take a fifth to a third less time."""
    converted: M = convert_conv2d_weight_memory_format(module, torch.channels_last)
    return converted


def _milestones(settings: Settings) -> list[int]:
    return [round(share * settings.steps) for share in settings.lr_drops]
