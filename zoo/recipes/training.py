"""Training from a seed, in steps that can be interrupted and taken up again bit for bit."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dnifx.errors import LossError
from dnifx.zoo.batches import Batches
from dnifx.zoo.data import Split
from dnifx.zoo.recipes.diagnosis import Comparison, Diagnosis, Look
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.store import Checkpoint


class Learner(ABC):
    """A model and the way it learns from a batch."""

    model: nn.Module
    """The model, whose error is measured."""

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on a batch, inputs [batch, ...] and classes [batch], and return its mean loss, detached.

        The loss is None where the step did not come to it, as a schedule may leave the last partition idle.
        """
        loss = self.compute(inputs, targets)
        self.advance()
        return loss

    @abstractmethod
    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Do all of a step that runs on the device, and return its loss as ``step`` does."""

    @abstractmethod
    def advance(self) -> None:
        """Do what is left of a step: let learning rates and schedules go on."""

    @abstractmethod
    def diagnosed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Comparison]:
        """Do what ``step`` does, and compare the synthetic gradients with the gradients that they are fitted to."""

    @abstractmethod
    def probe(self, inputs: Tensor, targets: Tensor) -> Comparison:
        """Compare the synthetic gradients with those of backpropagation, and change nothing."""

    @property
    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Everything that updates parameters."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that ``state_dict`` gave."""


class Watcher(Protocol):
    """Who is told how training goes."""

    def step(self, step: int) -> None:
        """Be told that ``step`` steps are done."""

    def point(self, point: Point) -> None:
        """Be told of a new place on the curve."""

    def look(self, look: Look) -> None:
        """Be told how good the synthetic gradients are."""

    def harm(self, text: str) -> None:
        """Be told that a synthetic gradient does harm."""


@dataclass(frozen=True)
class Progress:
    """How far a training run is.

    Attributes:
        step: Steps done.
        seconds: Time that they took.
        curve: The learning curve so far.
    """

    step: int = 0
    seconds: float = 0.0
    curve: tuple[Point, ...] = ()


def train(
    learner: Learner,
    batches: Batches,
    validation: Split,
    *,
    steps: int,
    every: int,
    watcher: Watcher,
    diagnosis: Diagnosis,
    checkpoint: Checkpoint | None = None,
) -> Progress:
    """Train for ``steps`` steps, or for what is left of them after the checkpoint, and return how it went.

    Args:
        learner: What is trained.
        batches: What it is trained on.
        validation: What its error is measured on.
        steps: Steps in all.
        every: Steps from one measurement to the next; a checkpoint is saved after each.
        watcher: Who is told how it goes.
        diagnosis: Follows the synthetic gradients; afterwards it holds what it saw.
        checkpoint: Where the run is saved and resumed from.

    Raises:
        LossError: Where the loss is no longer finite.
        StateError: Where the checkpoint cannot be taken up.
    """
    progress = _resume(learner, batches, diagnosis, checkpoint)
    for point in progress.curve[-1:]:
        watcher.point(point)
    for look in diagnosis.looks[-1:]:
        watcher.look(look)
    watcher.step(progress.step)
    while progress.step < steps:
        progress = _stretch(learner, batches, progress, min(every, steps - progress.step), watcher, diagnosis)
        point = Point(progress.step, progress.curve[-1].loss, error_rate(learner.model, validation))
        progress = replace(progress, curve=(*progress.curve[:-1], point))
        if checkpoint is not None:
            checkpoint.save(_state(learner, batches, diagnosis, progress))
        watcher.point(point)
    return progress


def error_rate(model: nn.Module, split: Split, batch: int = 250) -> float:
    """Return the share of a split, in percent, that the model, in evaluation mode, classifies wrongly."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        pairs = zip(torch.split(split.inputs, batch), torch.split(split.targets, batch), strict=True)
        wrong = sum(int((model(inputs).argmax(1) != targets).sum()) for inputs, targets in pairs)
    model.train(was_training)
    return 100 * wrong / len(split)


def _stretch(
    learner: Learner, batches: Batches, progress: Progress, count: int, watcher: Watcher, diagnosis: Diagnosis
) -> Progress:
    begin = time.perf_counter()
    losses = []
    for step in range(progress.step + 1, progress.step + count + 1):
        losses.append(_step(learner, batches, step, watcher, diagnosis))
        watcher.step(step)
    loss = _mean([loss for loss in losses if loss is not None], step)
    point = Point(step, loss, math.nan)
    return Progress(step, progress.seconds + time.perf_counter() - begin, (*progress.curve, point))


def _step(learner: Learner, batches: Batches, step: int, watcher: Watcher, diagnosis: Diagnosis) -> Tensor | None:
    if diagnosis.looks_at(step):
        loss, found = learner.diagnosed(*batches.next())
        for text in diagnosis.see(step, found):
            watcher.harm(text)
        watcher.look(diagnosis.looks[-1])
    else:
        loss = learner.step(*batches.next())
    if diagnosis.probes_at(step):
        diagnosis.compare(step, learner.probe(*diagnosis.batch))
    return loss


def _mean(losses: list[Tensor], step: int) -> float:
    if not losses:
        raise LossError(f"no loss was computed in the steps up to {step}; give a longer --evaluate-every")
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise LossError(f"the training loss is {mean} by step {step}, expected a finite number; give a lower --lr")
    return mean


def _state(learner: Learner, batches: Batches, diagnosis: Diagnosis, progress: Progress) -> dict[str, Any]:
    return {
        "step": progress.step,
        "seconds": progress.seconds,
        "curve": [(point.step, point.loss, point.error) for point in progress.curve],
        "learner": learner.state_dict(),
        "batches": batches.state_dict(),
        "diagnosis": diagnosis.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
    }


def _resume(learner: Learner, batches: Batches, diagnosis: Diagnosis, checkpoint: Checkpoint | None) -> Progress:
    state = None if checkpoint is None else checkpoint.load()
    if state is None:
        return Progress()
    learner.load_state_dict(state["learner"])
    batches.load_state_dict(state["batches"])
    if "diagnosis" in state:
        diagnosis.load_state_dict(state["diagnosis"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return Progress(state["step"], state["seconds"], tuple(Point(*point) for point in state["curve"]))
