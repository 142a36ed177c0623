"""Training runs on endless streams, which can be interrupted and resumed bit for bit."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from dnifx.zoo.recipes.checks import check_finite
from dnifx.zoo.recipes.live import Line, live
from dnifx.zoo.recipes.store import Checkpoint

P = TypeVar("P")
R = TypeVar("R")


class Resumable(ABC, Generic[P]):
    """One variant trained from one seed, with regular measurements and checkpoints.

    Attributes:
        point: Type of a point of the curve, a dataclass.
        parts: Names of the attributes whose ``state_dict`` belongs to the run's state.
        plain: Names of the attributes that are saved as they are.
        stride: Steps that one call of ``step`` makes.
        done: Whether to stop before the last step.
        seconds: Time that the steps took.
        curve: The measurements.
    """

    point: ClassVar[type[Any]]
    parts: ClassVar[tuple[str, ...]]
    plain: ClassVar[tuple[str, ...]]
    stride = 1
    done = False
    seconds = 0.0
    curve: Sequence[P] = ()

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps done."""

    @abstractmethod
    def step(self) -> Tensor | float:
        """Train for ``stride`` steps and return the loss."""

    @abstractmethod
    def measure(self, loss: float, line: Line) -> P:
        """Return the next point of the curve, with the mean loss since the point before."""

    def train(self, steps: int, every: int, checkpoint: Checkpoint | None, line: Line) -> None:
        """Train up to step ``steps``, from the checkpoint if there is one.

        Every ``every`` steps it measures and saves a checkpoint.

        Raises:
            LossError: The loss is no longer finite.
            StateError: The checkpoint cannot be resumed.
        """
        state = None if checkpoint is None else checkpoint.load()
        if state is not None:
            self.load_state_dict(state)
        line.step(self.steps)
        while self.steps < steps and not self.done:
            loss = self._stretch(min(every, steps - self.steps), line)
            self.curve = [*self.curve, self.measure(loss, line)]
            if checkpoint is not None:
                checkpoint.save(self.state_dict())

    def _stretch(self, count: int, line: Line) -> float:
        """Train for ``count`` steps and return the mean loss."""
        begin, total = time.perf_counter(), torch.zeros(())
        for _ in range(count // self.stride):
            total = total + self.step()
            line.step(self.steps)
        self.seconds += time.perf_counter() - begin
        return check_finite(float(total) * self.stride / count, self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on."""
        return {
            **{name: getattr(self, name).state_dict() for name in self.parts},
            **{name: getattr(self, name) for name in self.plain},
            "seconds": self.seconds,
            "curve": [astuple(point) for point in self.curve],  # type: ignore[call-overload]
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state. Points of older checkpoints are mappings."""
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        for name in (*self.plain, "seconds"):
            setattr(self, name, state[name])
        saved = [each.values() if isinstance(each, Mapping) else each for each in state["curve"]]
        self.curve = [self.point(*values) for values in saved]
        torch.set_rng_state(state["random"])


def train_each(
    names: Sequence[str],
    seeds: range,
    steps: int,
    console: Console,
    train: Callable[[int, int, Line], R],
    log_dir: Path | None = None,
) -> list[tuple[R, ...]]:
    """Train every variant from every seed, show the progress, and return the runs of each variant.

    Args:
        names: The variants' names.
        seeds: The seeds.
        steps: Training steps of one run.
        console: Shows the progress.
        train: Makes one run. Its arguments are the variant's place among the names, the seed, and
            the line that shows the progress.
        log_dir: The folder for TensorBoard, if it is asked for.
    """
    found: list[list[R]] = [[] for _ in names]
    with live(console, dict.fromkeys(names, len(seeds)), steps, log_dir) as shown:
        for seed in seeds:
            for place, name in enumerate(names):
                with torch.random.fork_rng(devices=[]):
                    found[place].append(train(place, seed, shown.line(name, seed)))
    return [tuple(runs) for runs in found]
