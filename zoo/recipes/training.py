"""Feed-forward training from a seed. An interrupted run resumes bit for bit."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dnifx.errors import LossError
from dnifx.zoo.batches import Batches
from dnifx.zoo.data import Split
from dnifx.zoo.recipes.checks import check_finite
from dnifx.zoo.recipes.diagnosis import Comparison, Diagnosis, Look
from dnifx.zoo.recipes.ranks import Saved
from dnifx.zoo.recipes.results import Point


class Learner(ABC):
    """A model and the way it learns from a batch."""

    model: nn.Module
    """The model whose error is measured."""

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on inputs [batch, ...] and classes [batch]; return the mean loss, detached.

        The loss is None if the schedule leaves the last partition idle in this step.
        """
        loss = self.compute(inputs, targets)
        self.advance()
        return loss

    @abstractmethod
    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Do the part of a step that runs on the device, and return the loss as ``step`` does."""

    @abstractmethod
    def advance(self) -> None:
        """Do the rest of a step: advance learning rates and schedules."""

    @abstractmethod
    def diagnosed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Comparison]:
        """Do a step, and compare the synthetic gradients with their targets."""

    @abstractmethod
    def probe(self, inputs: Tensor, targets: Tensor) -> Comparison:
        """Compare the synthetic gradients with the true gradients. Nothing changes."""

    @abstractmethod
    def evaluate(self, inputs: Tensor) -> Tensor:
        """Return the model's output for inputs [batch, ...] in its present mode; over ranks, in every process."""

    @abstractmethod
    def told(self, loss: float | None) -> float | None:
        """Return the loss that the last partition's process knows; over ranks, in every process."""

    @abstractmethod
    def finish(self) -> None:
        """End the training: over ranks, bring all weights into every process."""

    @property
    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""


class Watcher(Protocol):
    """Receives the progress of a run."""

    def step(self, step: int) -> None:
        """Receive the number of steps done."""

    def point(self, point: Point) -> None:
        """Receive a new point of the curve."""

    def look(self, look: Look) -> None:
        """Receive the quality of the synthetic gradients."""

    def harm(self, text: str) -> None:
        """Receive the warning that a synthetic gradient does harm."""


@dataclass(frozen=True)
class Progress:
    """The progress of a training run.

    Attributes:
        step: Steps done.
        seconds: Time that the steps took.
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
    checkpoint: Saved | None = None,
) -> Progress:
    """Train up to step ``steps``, from the checkpoint if there is one, and return the progress.

    Args:
        learner: The learner to train.
        batches: The training examples.
        validation: The examples for the validation error.
        steps: Steps in all.
        every: Measure and save a checkpoint every so many steps.
        watcher: Receives the progress.
        diagnosis: Follows the synthetic gradients and keeps the looks and probes.
        checkpoint: Where to save to and resume from.

    Raises:
        LossError: The loss is no longer finite.
        StateError: The checkpoint cannot be resumed.
    """
    progress = _resume(learner, batches, diagnosis, checkpoint)
    for point in progress.curve[-1:]:
        watcher.point(point)
    for look in diagnosis.looks[-1:]:
        watcher.look(look)
    watcher.step(progress.step)
    while progress.step < steps:
        progress = _stretch(learner, batches, progress, min(every, steps - progress.step), watcher, diagnosis)
        point = Point(
            progress.step, progress.curve[-1].loss, error_rate(learner.model, validation, evaluate=learner.evaluate)
        )
        progress = replace(progress, curve=(*progress.curve[:-1], point))
        if checkpoint is not None:
            checkpoint.save(_state(learner, batches, diagnosis, progress))
        watcher.point(point)
    learner.finish()
    return progress


def error_rate(
    model: nn.Module, split: Split, batch: int = 250, evaluate: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Return the percentage of a split that the model classifies wrongly in evaluation mode.

    Args:
        model: The model.
        split: The examples.
        batch: How many of them are evaluated at once.
        evaluate: From inputs to outputs; by default the model itself.
    """
    outputs, was_training = evaluate or model, model.training
    model.eval()
    with torch.no_grad():
        pairs = zip(torch.split(split.inputs, batch), torch.split(split.targets, batch), strict=True)
        wrong = sum(int((outputs(inputs).argmax(1) != targets).sum()) for inputs, targets in pairs)
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
    known = [loss for loss in losses if loss is not None]
    loss = _checked(learner.told(float(torch.stack(known).mean()) if known else None), step)
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


def _checked(loss: float | None, step: int) -> float:
    if loss is None:
        raise LossError(f"no loss was computed in the steps up to {step}; give a higher --evaluate-every")
    return check_finite(loss, step)


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


def _resume(learner: Learner, batches: Batches, diagnosis: Diagnosis, checkpoint: Saved | None) -> Progress:
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
