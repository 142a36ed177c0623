"""Steps on a GPU: eager, as a captured CUDA graph, or compiled, whichever is measured fastest."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from dnifx.errors import OptionError
from dnifx.zoo.recipes.diagnosis import Comparison
from dnifx.zoo.recipes.learners import LoopLearner
from dnifx.zoo.recipes.training import Learner

WARM, TIMED = 10, 50
"""Steps of a way before its time is taken, and those over which it is."""


class Runner(Protocol):
    """What does a step's work on the device."""

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on a batch, inputs [batch, ...] and classes [batch], and return its mean loss, detached."""


class Fastest(Learner):
    """Tries ways to run a learner's steps, each for some steps of the training itself, and goes on with the fastest.

    Args:
        learner: What is trained.
        ways: By name, what runs its steps; the only one is taken as it is.
        clock: Returns seconds once the device has done all it was given.
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
        """Train on a batch in the fastest way, or in one that is being tried."""
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
        """Train on a batch as the learner itself does, and compare; no way's time is taken meanwhile."""
        with self._untimed():
            return self._learner.diagnosed(inputs, targets)

    def probe(self, inputs: Tensor, targets: Tensor) -> Comparison:
        """Compare with the true gradient, and change nothing."""
        with self._untimed():
            return self._learner.probe(inputs, targets)

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
        """Let learning rates and schedules go on."""
        self._learner.advance()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the learner."""
        return self._learner.optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state, and the way that was chosen."""
        return {"learner": self._learner.state_dict(), "way": self.way}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state; a choice that was not made yet is begun anew."""
        self._learner.load_state_dict(state["learner"])
        self.way = state["way"] if len(self._ways) > 1 else self.way
        self.seconds, self._tried = {}, 0
        for runner in self._ways.values():
            if isinstance(runner, Graph):
                runner.forget()


class Graph:
    """A learner's step as a CUDA graph: recorded once for each learning rate, then replayed on new batches.

    Args:
        learner: What is trained, on a GPU; every step has the same shapes and does the same work.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._warm = 0
        self._rates: list[float] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def compute(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Train on a batch: the first times as it comes, so that all memory is there, then by the graph."""
        if self._warm < 3:
            return self._ahead(inputs, targets)
        rates = [group["lr"] for optimizer in self._learner.optimizers for group in optimizer.param_groups]
        if self._graph is None or rates != self._rates:
            self._capture(inputs, targets)
            self._rates = rates
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        if self._graph is not None:
            self._graph.replay()
        return None if self._loss is None else self._loss.clone()

    def forget(self) -> None:
        """Record again, for the tensors that the learner works on are others now."""
        self._graph, self._warm = None, 0

    def _ahead(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        self._warm += 1
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._learner.compute(inputs, targets)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs, self._targets = inputs.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._loss = self._learner.compute(self._inputs, self._targets)
        except RuntimeError as error:
            raise OptionError(
                f"--step: this step cannot be captured as a CUDA graph ({error}); give --step eager"
            ) from error
        self._graph = graph


def accelerated(learner: Learner, step: str, drawn: bool, device: torch.device) -> Learner:
    """Return the learner as its steps are run on a device: on a CPU as it is.

    Args:
        learner: What is trained.
        step: ``auto``, ``eager``, ``graph`` or ``compiled``.
        drawn: Whether its schedule changes from step to step, which no graph can follow.
        device: Where it is trained.

    Raises:
        OptionError: Where the step cannot be run so.
    """
    if device.type != "cuda":
        if step in {"graph", "compiled"}:
            raise OptionError(f"--step: {step} is for GPUs, got --device {device.type}; leave it out")
        return learner
    can: dict[str, Runner] = {"eager": learner}
    if not drawn:
        can["graph"] = Graph(learner)
    if isinstance(learner, LoopLearner):
        can["compiled"] = learner.compiled()
    if step != "auto" and step not in can:
        raise OptionError(
            f"--step: {step} is not for this arm, which can run {' or '.join(can)}: a drawn schedule is no graph, and only the "
            "fused target compiles; leave it out"
        )
    return Fastest(learner, can if step == "auto" else {step: can[step]}, _synchronised)


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
