"""Steps on a GPU: eager, as a CUDA graph, or compiled. Measuring finds the fastest."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

import dnifx
from dnifx.errors import OptionError, ScheduleError
from dnifx.zoo.recipes.diagnosis import Comparison
from dnifx.zoo.recipes.learners import LoopLearner
from dnifx.zoo.recipes.training import Learner

WARM, TIMED = 10, 50
"""Number of untimed and then of timed steps when a way to run is tried."""


class Runner(Protocol):
    """Does a step's work on the device."""

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on inputs [batch, ...] and classes [batch]; return the mean loss, detached."""


class Fastest(Learner):
    """Tries several ways to run a learner's steps during training, and continues with the fastest.

    Args:
        learner: The learner to train.
        ways: The ways to run its steps, by name. A single one is used without a trial.
        clock: Waits for the device and returns the time in seconds.
    """

    def __init__(self, learner: Learner, ways: Mapping[str, Runner], clock: Callable[[], float]) -> None:
        self.model = learner.model
        self.way = next(iter(ways)) if len(ways) == 1 else None
        self.seconds: dict[str, float] = {}
        self._learner = learner
        self._ways = dict(ways)
        self._clock = clock
        self._tried = 0
        self._begin = 0.0

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on a batch in the fastest way, or in the way on trial."""
        if self.way is not None:
            return self._ways[self.way].compute(inputs, targets)
        name = list(self._ways)[len(self.seconds)]
        if self._tried == WARM:
            self._begin = self._clock()
        loss = self._ways[name].compute(inputs, targets)
        self._tried += 1
        if self._tried == WARM + TIMED:
            self._note(name)
        return loss

    def diagnosed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Comparison]:
        """Train on a batch as the learner does, and compare. The time does not count in a trial."""
        with self._untimed():
            return self._learner.diagnosed(inputs, targets)

    def probe(self, inputs: Tensor, targets: Tensor) -> Comparison:
        """Compare with the true gradient. Nothing changes."""
        with self._untimed():
            return self._learner.probe(inputs, targets)

    def evaluate(self, inputs: Tensor) -> Tensor:
        """Return the model's output."""
        return self._learner.evaluate(inputs)

    def told(self, losses: Tensor | None) -> Tensor | None:
        """Return the losses that the last partition's process knows."""
        return self._learner.told(losses)

    def listen(self, step: int) -> None:
        """Stop where a SIGTERM comes."""
        self._learner.listen(step)

    def stopped(self, step: int) -> int:
        """Return the signal after which the training stops."""
        return self._learner.stopped(step)

    def finish(self) -> None:
        """End the training."""
        self._learner.finish()

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        begin = self._clock()
        yield
        self._begin += self._clock() - begin

    def _note(self, name: str) -> None:
        self.seconds[name] = (self._clock() - self._begin) / TIMED
        self._tried = 0
        if len(self.seconds) == len(self._ways):
            self.way = min(self.seconds, key=self.seconds.__getitem__)

    def advance(self) -> None:
        """Advance learning rates and schedules."""
        self._learner.advance()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the learner."""
        return self._learner.optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state and the chosen way."""
        return {"learner": self._learner.state_dict(), "way": self.way}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state. An unfinished trial starts again."""
        self._learner.load_state_dict(state["learner"])
        self.way = state["way"] if len(self._ways) > 1 else self.way
        self.seconds, self._tried = {}, 0
        for runner in self._ways.values():
            if isinstance(runner, Graph):
                runner.forget()


class Graph:
    """A learner's step as a CUDA graph: recorded once for each learning rate, then replayed.

    Args:
        learner: The learner to train, on a GPU.
        device: The GPU.
    """

    def __init__(self, learner: Learner, device: torch.device) -> None:
        self._learner, self._graphs = learner, dnifx.StepGraphs(device)

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on a batch. The first steps run eagerly, so that all memory is allocated; later ones replay the graph.

        Raises:
            OptionError: The step cannot be recorded.
        """
        rates = tuple(group["lr"] for optimizer in self._learner.optimizers for group in optimizer.param_groups)
        try:
            loss: Tensor | None = self._graphs.made(
                lambda batch: self._learner.compute(*batch), (inputs, targets), rates
            )
        except ScheduleError as error:
            raise OptionError(f"--step: {error}; give --step eager") from error
        return loss

    def forget(self) -> None:
        """Record the graph again, because the learner's tensors were replaced."""
        self._graphs.forget()


def accelerated(learner: Learner, step: str, drawn: bool, device: torch.device) -> Learner:
    """Return a learner that runs its steps as ``step`` says; on a CPU the learner itself.

    Args:
        learner: The learner to train.
        step: ``auto``, ``eager``, ``graph`` or ``compiled``.
        drawn: Whether the schedule is random or has a lag. A graph cannot follow one that differs from step to step.
        device: The device to train on.

    Raises:
        OptionError: This device or this learner cannot run such steps.
    """
    if device.type != "cuda":
        if step in {"graph", "compiled"}:
            raise OptionError(f"--step: {step} is for GPUs, got --device {device.type}; leave --step out")
        return learner
    can: dict[str, Runner] = {"eager": learner}
    if not drawn:
        can["graph"] = Graph(learner, device)
    if isinstance(learner, LoopLearner):
        can["compiled"] = learner.compiled()
    if step != "auto" and step not in can:
        raise OptionError(
            f"--step: got {step}, but this variant can only run {' or '.join(can)}: a random schedule or a lag has "
            "no graph, and only the fused target compiles; leave --step out"
        )
    return Fastest(learner, can if step == "auto" else {step: can[step]}, _synchronised)


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
