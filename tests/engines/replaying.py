"""A CUDA graph on the CPU: what a function does is written down as operations on fixed memory, and done again by a replay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dnifx.runtime.training.trainer import Trainer


class Tape(TorchDispatchMode):
    """Writes operations down. Each is done once while it is written, to know the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.lines.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        """Do all of it again: the same operations on the same tensors, with results in the memory of the first time."""
        with torch.no_grad():
            for func, args, kwargs, made in self.lines:
                given = {memory(each) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
                again = func(*args, **kwargs)
                pairs = zip(pytree.tree_leaves(made), pytree.tree_leaves(again), strict=True)
                for first, second in pairs:
                    if isinstance(first, Tensor) and memory(first) not in given:  # neither a view nor in place
                        first.copy_(second)


def memory(tensor: Tensor) -> int:
    """Tell the memory of a tensor."""
    return tensor.untyped_storage().data_ptr()


def recorder(state: Callable[[], list[Tensor]]) -> Callable[[Callable[[], Any], Any], Any]:
    """Return what records a function as ``dnifx.engines.cuda_graph.record`` does: nothing is done by it.

    Args:
        state: Gives all tensors that it may change.
    """

    def record(run: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], object], Any]:
        tape, before = Tape(), [(each, each.detach().clone()) for each in state()]
        with tape:
            made = run()
        with torch.no_grad():
            for each, value in before:
                each.copy_(value)
        return made, tape.replay, pool

    return record


def tensors_of(trainer: Trainer) -> list[Tensor]:
    """Return the tensors that the steps of a trainer change."""
    optimizers = [*trainer.optimizers.values(), *trainer.estimator_optimizers.values()]
    states = [value for one in optimizers for state in one.state.values() for value in state.values()]
    return [*trainer.net.parameters(), *trainer.net.buffers(), *(each for each in states if isinstance(each, Tensor))]


@contextmanager
def nothing_aside(device: torch.device) -> Iterator[None]:
    """Stand in for a stream of its own."""
    yield
