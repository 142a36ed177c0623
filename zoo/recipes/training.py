"""Feed-forward training from a seed. An interrupted run resumes bit for bit."""

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

KILLED = 128
"""What the exit code of a process is, beside the number of the signal that ended it."""


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
    def told(self, losses: Tensor | None) -> Tensor | None:
        """Return the losses that the last partition's process knows; over ranks, in every process."""

    @abstractmethod
    def listen(self, step: int) -> None:
        """From now on, with so many steps done, stop where a SIGTERM comes; over ranks, to any process."""

    @abstractmethod
    def stopped(self, step: int) -> int:
        """Return the signal after which the training stops with so many steps done, in every process; 0 where it goes on."""

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
        losses: Those of the steps since its last point, as far as they are known here.
    """

    step: int = 0
    seconds: float = 0.0
    curve: tuple[Point, ...] = ()
    losses: tuple[Tensor, ...] = ()


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
        SystemExit: A SIGTERM came, and a checkpoint was saved.
    """
    progress = _resume(learner, batches, diagnosis, checkpoint)
    for point in progress.curve[-1:]:
        watcher.point(point)
    for look in diagnosis.looks[-1:]:
        watcher.look(look)
    watcher.step(progress.step)
    if checkpoint is not None:
        learner.listen(progress.step)
    while progress.step < steps:
        end = min(steps, (progress.step // every + 1) * every)
        progress, signalled = _stretch(learner, batches, progress, end, watcher, diagnosis)
        losses = learner.told(torch.stack(progress.losses) if progress.losses else None)
        if progress.step == end:
            error = error_rate(learner.model, validation, evaluate=learner.evaluate)
            point = Point(end, _checked(losses, end), error)
            progress, losses = replace(progress, curve=(*progress.curve, point), losses=()), None
        if checkpoint is not None:
            checkpoint.save(_state(learner, batches, diagnosis, progress, losses))
        if signalled:
            learner.finish()
            raise SystemExit(KILLED + signalled)
        watcher.point(progress.curve[-1])
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
    learner: Learner, batches: Batches, progress: Progress, end: int, watcher: Watcher, diagnosis: Diagnosis
) -> tuple[Progress, int]:
    """Train up to a step, or until a signal stops the run before; return its number, else 0."""
    begin, losses, signalled = time.perf_counter(), list(progress.losses), 0
    for step in range(progress.step + 1, end + 1):
        losses += [loss for loss in (_step(learner, batches, step, watcher, diagnosis),) if loss is not None]
        watcher.step(step)
        if signalled := learner.stopped(step):
            break
    return Progress(step, progress.seconds + time.perf_counter() - begin, progress.curve, tuple(losses)), signalled


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


def _checked(losses: Tensor | None, step: int) -> float:
    if losses is None:
        raise LossError(f"no loss was computed in the steps up to {step}; give a higher --evaluate-every")
    return check_finite(float(losses.mean()), step)


def _state(
    learner: Learner, batches: Batches, diagnosis: Diagnosis, progress: Progress, losses: Tensor | None
) -> dict[str, Any]:
    return {
        "losses": losses,
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
    losses = state.get("losses")
    curve = tuple(Point(*point) for point in state["curve"])
    return Progress(state["step"], state["seconds"], curve, () if losses is None else tuple(losses))
