"""A whole step as one CUDA graph: recorded once for each kind of step, then replayed with one call.

Python runs while a step is recorded, and not again. So a graph is kept for all that Python reads then: shapes, the schedule,
learning rates. The first steps of each kind run as they come, so that all memory is there.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.engines.base import OneProcess
from dnifx.errors import InputError, ScheduleError

WARM = 3
"""How many steps of a kind run before one is recorded."""

MOST = 8
"""How many graphs are kept. Steps of other kinds run as they come."""


@dataclass
class Recorded:
    """A step that was recorded.

    Attributes:
        replay: Does its work again.
        inputs: The tensors that it reads, to be overwritten before.
        made: What it gives, overwritten by each replay.
    """

    replay: Callable[[], object]
    inputs: Sequence[Tensor]
    made: Any


class StepGraphs:
    """The graphs of a step, one for each kind of batch and of what Python reads.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied: graphs are recorded anew."""
        return {"device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what was copied."""
        self.__init__(**state)  # type: ignore[misc]

    def forget(self) -> None:
        """Record all steps anew, since tensors that they write were replaced."""
        self._graphs: dict[Hashable, Recorded] = {}
        self._warm: Counter[Hashable] = Counter()
        self._pool: Any = None

    def made(self, run: Callable[[Any], Any], batch: Any, reads: Hashable) -> Any:
        """Return what a step makes of a batch; what it gives is a copy, without a graph for gradients.

        Args:
            run: The step; it does the same for equal kinds of batches and equal ``reads``.
            batch: What it is given, as a tree with tensors on the device.
            reads: All else that decides what its Python does.

        Raises:
            InputError: A tensor is on another device, or something in the batch cannot be told from other things.
            ScheduleError: The step cannot be recorded.
        """
        leaves, structure = pytree.tree_flatten(batch)
        kind = reads, str(structure), tuple(map(self.kind_of, leaves))
        found = self._graphs.get(kind)
        if found is None and (self._warm[kind] < WARM or len(self._graphs) >= MOST):
            self._warm[kind] += 1
            with aside(self.device):
                return run(batch)
        if found is None:
            own = [each.clone() if isinstance(each, Tensor) else each for each in leaves]
            with recording():
                made, replay, self._pool = record(lambda: run(pytree.tree_unflatten(own, structure)), self._pool)
            refuse_hidden(made)
            found = self._graphs[kind] = Recorded(replay, [each for each in own if isinstance(each, Tensor)], made)
        given = (each for each in leaves if isinstance(each, Tensor))
        for own_input, each in zip(found.inputs, given, strict=True):
            own_input.copy_(each)
        found.replay()
        return pytree.tree_map_only(Tensor, lambda each: each.detach().clone(), found.made)

    def kind_of(self, leaf: Any) -> Hashable:
        """Return what of a leaf decides which graph runs.

        Raises:
            InputError: It is on another device, or can not be compared.
        """
        if isinstance(leaf, Tensor):
            if leaf.device.type != self.device.type or self.device.index not in (None, leaf.device.index):
                raise InputError(
                    f"a step as a CUDA graph takes batches on {self.device}, and a tensor is on {leaf.device}. Move it there "
                    "before the step"
                )
            return leaf.shape, leaf.dtype, leaf.stride()
        try:
            hash(leaf)
        except TypeError as error:
            raise InputError(
                f"a step as a CUDA graph cannot tell one {type(leaf).__name__} in a batch from another; give tensors, numbers and text"
            ) from error
        return type(leaf), leaf


class CudaGraph(OneProcess):
    """The engine of a run in one process whose steps are CUDA graphs.

    Args:
        device: Where the model is.
    """

    captures = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.graphs = StepGraphs(device)

    def made(self, run: Callable[[Any], Any], batch: Any, reads: Callable[[], Hashable]) -> Any:
        """Run a step, or replay it."""
        return self.graphs.made(run, batch, reads())

    def restart(self, lag: int) -> None:
        """Record steps anew: a saved state has put other tensors in the place of those of the optimizers."""
        self.graphs.forget()


def refuse_hidden(made: Any) -> None:
    """Raise ScheduleError where a step gives something whose tensors, which each replay overwrites, cannot be found."""
    hidden = [each for each in pytree.tree_leaves(made) if not isinstance(each, Tensor | int | float | str | None)]
    if hidden:
        raise ScheduleError(
            f"a step as a CUDA graph cannot give a {type(hidden[0]).__name__}, whose tensors each replay overwrites. Let forward return "
            "tensors, tuples, lists or dicts, or leave engine= out"
        )


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run something on a stream of its own, as a recording does, so that it allocates what a recording will need."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextmanager
def recording() -> Iterator[None]:
    """Explain an error while a step is recorded.

    Raises:
        ScheduleError: It cannot be.
    """
    try:
        yield
    except RuntimeError as error:
        raise ScheduleError(
            f"this step cannot be recorded as a CUDA graph: {str(error).splitlines()[0][:200]}. Nothing in it may wait for the device "
            "(.item(), printing, a comparison that Python reads); leave engine= out to run it as it comes"
        ) from error


def record(run: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], object], Any]:
    """Record what is run, which does nothing yet; return what it gives, what replays it, and its memory, to be shared."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        made = run()
    return made, graph.replay, graph.pool()
