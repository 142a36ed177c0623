"""Tied parameters that partitions read some steps late: what they read now, and what they are to read later."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dnifx.errors import ScheduleError
from dnifx.runtime.training.flight import still

Values = dict[str, Tensor]
"""By the path of a parameter."""


class Tied:
    """What partitions read of parameters that another partition updates, where its updates reach them some steps late.

    Args:
        parameter: From the path of a parameter to the parameter.
        paths: The parameters that partitions here read, and others update.

    Attributes:
        step: The present step.
        behind: Whether, over ranks, the model holds other values than present ones where another rank updates them.
    """

    def __init__(self, parameter: Callable[[str], Tensor], paths: Iterable[str]) -> None:
        self.parameter, self.paths, self.step, self.behind = parameter, frozenset(paths), 0, False
        self._now: Values = {}
        self._due: dict[str, dict[int, Tensor]] = {}
        self._leaves: dict[str, dict[str, nn.Parameter]] = {}
        self._others: list[Mapping[str, Any]] = []
        self._places: dict[tuple[int, str], list[tuple[dict[str, Any], str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied: where parameters stand is found anew."""
        return {**self.__dict__, "_places": {}, "_leaves": {}}

    def begin(self, step: int) -> None:
        """Begin a step; what was for earlier ones is dropped."""
        self.step = step
        self._leaves.clear()
        self._others.clear()
        self._due = {path: still(kept, step) for path, kept in self._due.items()}

    def hold(self, *paths: str) -> None:
        """Let partitions read what parameters are now, where they have read nothing yet: nothing was updated before."""
        for path in paths:
            if path not in self._now:
                self._now[path] = self.copied(path)

    def copied(self, path: str) -> Tensor:
        """Return a copy of what a parameter is now.

        Raises:
            ScheduleError: The step is being captured as a CUDA graph.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ScheduleError(
                f"a step that reads {path!r} some steps late cannot be captured as a CUDA graph: what is kept changes from step to step. "
                "Run the step as it comes, or give tied_lag=0"
            )
        return self.parameter(path).detach().clone()

    def keep(self, lag: int, *paths: str) -> None:
        """Keep what an update has made, to be read ``lag`` steps later."""
        for path in paths:
            self._due.setdefault(path, {})[self.step + lag] = self.copied(path)

    def renew(self, *paths: str) -> None:
        """Let partitions read from now on what was kept for this step; where nothing was, what they read stays."""
        for path in paths:
            found = self._due.get(path, {}).pop(self.step, None)
            if found is not None:
                self._now[path] = found

    def receive(self, lag: int, receive: Callable[[], Sequence[Tensor]], *paths: str) -> None:
        """Let partitions read from now on what another rank's update made ``lag`` steps ago; receive that, unless it is here."""
        if self.step >= lag and self.lacks(self.step, paths):
            self.file(self.step, paths, receive())
        self.renew(*paths)

    def file(self, step: int, paths: Sequence[str], values: Sequence[Tensor]) -> None:
        """Keep what was received, to be read from a step on."""
        for path, value in zip(paths, values, strict=True):
            self._due.setdefault(path, {})[step] = value

    def lacks(self, step: int, paths: Sequence[str]) -> bool:
        """Whether what is to be read from a step on has not been received."""
        return not all(step in self._due.get(path, {}) for path in paths)

    @contextmanager
    def read(self, name: str, module: nn.Module, *paths: str) -> Iterator[None]:
        """Let the graph of a partition read what is read now, as leaves of its own."""
        self.hold(*paths)
        leaves = {path: nn.Parameter(self._now[path], self.parameter(path).requires_grad) for path in paths}
        self._leaves[name] = leaves
        with self.again(name, module):
            yield

    @contextmanager
    def again(self, name: str, module: nn.Module) -> Iterator[None]:
        """Let the graph of a partition read what its forward pass has read."""
        leaves = self._leaves[name]
        own = {path: self.parameter(path) for path in leaves}
        standing = [(*each, path) for path in leaves for each in self._standing(module, path)]
        try:
            for registry, key, path in standing:
                registry[key] = leaves[path]
            yield
        finally:
            for registry, key, path in standing:
                registry[key] = own[path]

    def _standing(self, module: nn.Module, path: str) -> list[tuple[dict[str, Any], str]]:
        """Return where a parameter stands in the modules of a graph: under each of its names."""
        parameter = self.parameter(path)
        known = self._places.get((id(module), path))
        if known is None or any(registry[key] is not parameter for registry, key in known):
            registries: list[dict[str, Any]] = [each._parameters for each in module.modules()]
            known = [(registry, key) for registry in registries for key, each in registry.items() if each is parameter]
            self._places[id(module), path] = known
        return known

    def gradients(self, name: str, *paths: str) -> tuple[Tensor | None, ...]:
        """Take what the backward pass of a partition gave to what it has read."""
        return tuple([self._leaves[name][path].grad for path in paths])

    def state_dict(self, own: bool = False) -> dict[str, Any]:
        """Return what is read now and later; what partitions here read alone, or what was taken from other ranks too."""
        others = () if own else self._others
        due = {path: dict(each) for path, each in self._due.items() if each}
        return {
            "now": {path: each for state in others for path, each in state["now"].items()} | self._now,
            "due": {path: each for state in others for path, each in state["due"].items()} | due,
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Take what partitions on another rank read, to be saved."""
        self._others.append(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved, as far as partitions here read it."""
        self._leaves.clear()
        self._others.clear()
        self._now = {path: each for path, each in state["now"].items() if path in self.paths}
        self._due = {path: dict(each) for path, each in state["due"].items() if path in self.paths}
