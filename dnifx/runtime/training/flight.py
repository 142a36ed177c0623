"""Steps under way: what partitions keep until the true gradient of a step comes back, some steps late."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dnifx.errors import ScheduleError, StateError
from dnifx.ir import Program
from dnifx.runtime.emitted.backward import added, backpropagate
from dnifx.runtime.net.absent import Absent
from dnifx.runtime.training.late import summed

T = TypeVar("T")

Gradients = tuple[Tensor | None, ...]
"""What a consumer gave to the values of a boundary; None where it used one not at all."""

Senders = Sequence[tuple[int, int]]
"""Consumers of a boundary, each with the delay of its own backward pass."""

Route = tuple[int, Senders, int]
"""The number of a boundary, its consumers on another rank, and how many gradients each of them sends."""

OTHER_OUTPUTS = (
    "{name} gives other values for a saved batch than before: it draws numbers that torch's random state does not tell, or it is "
    "another model. A run with Late(k) can only be resumed where a forward pass can be made again"
)


@dataclass
class Passage:
    """One forward pass of a partition that waits for its gradient.

    Attributes:
        inputs: What it was given; boundary values are leaves.
        outputs: What it made.
        weights: The copies of its parameters that it ran with, by path.
        random: torch's random state before it.
        known: Whether ``outputs`` carry a graph; after loading they do not.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    weights: dict[str, Tensor]
    random: Tensor
    known: bool = True

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        learns = [isinstance(each, Tensor) and each.requires_grad for each in self.inputs]
        return {
            "inputs": tuple(map(bare, self.inputs)),
            "learns": learns,
            "outputs": tuple(map(bare, self.outputs)),
            "weights": {path: each.detach() for path, each in self.weights.items()},
            "random": self.random,
        }


def restored(state: Mapping[str, Any]) -> Passage:
    """Return a passage that was saved."""
    inputs = tuple(
        each.detach().clone().requires_grad_() if learns else each
        for each, learns in zip(state["inputs"], state["learns"], strict=True)
    )
    weights = {path: each.detach().clone().requires_grad_() for path, each in state["weights"].items()}
    return Passage(inputs, tuple(state["outputs"]), weights, state["random"], known=False)


def still(kept: dict[int, T], step: int) -> dict[int, T]:
    """Return what is used in a step or later."""
    return {due: each for due, each in kept.items() if due >= step}


def bare(value: Any) -> Any:
    """Return a value without its graph."""
    return value.detach() if isinstance(value, Tensor) else value


def corrected(gradient: Tensor, moved: Tensor, correction: float) -> Tensor:
    """Return a late gradient as it would be where the weights have moved to; its square stands for the curvature."""
    if not correction:
        return gradient
    known = gradient.coalesce() if gradient.is_sparse else gradient
    return known + correction * (known * known * moved)


def corrections_of(program: Program) -> dict[str, float]:
    """Return, by the name of a partition, how much its late gradients are corrected.

    Raises:
        ScheduleError: The boundaries of one partition say different things.
    """
    found: dict[str, float] = {}
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        if interface.late:
            name, own = program.partitions[boundary.producer].name, getattr(interface.estimator, "correction", 0.0)
            if found.setdefault(name, own) != own:
                raise ScheduleError(
                    f"the boundaries of {name} take Late with correction={found[name]} and {own}, but its weights have one gradient. Give "
                    "both the same"
                )
    return found


@dataclass
class Flight:
    """All passages under way in a part, and the gradients that have come back for them. Both are kept by the step of their use.

    Attributes:
        model: The model, whose parameters are updated.
        parameters: By partition, the paths of the parameters that it trains.
        corrections: By partition, how much its gradients are corrected for what its weights have moved since.
        step: The present step.
    """

    model: nn.Module
    parameters: Mapping[str, Sequence[str]]
    corrections: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    _passages: dict[str, dict[int, Passage]] = field(default_factory=dict)
    _gradients: dict[str, dict[int, dict[int, Gradients]]] = field(default_factory=dict)
    _done: dict[str, Passage] = field(default_factory=dict)
    _routes: dict[tuple[str, int], tuple[int, int, Route]] = field(default_factory=dict)
    _others: list[Mapping[str, Any]] = field(default_factory=list)

    def begin(self, step: int) -> None:
        """Begin a step; what was for earlier ones is dropped."""
        self.step = step
        self._done.clear()
        self._others.clear()
        self._passages = {name: still(kept, step) for name, kept in self._passages.items()}
        self._gradients = {key: still(kept, step) for key, kept in self._gradients.items()}

    def forward(self, name: str, delay: int, module: nn.Module, *inputs: Any) -> tuple[Any, ...]:
        """Run a partition on copies of its weights, and keep what its backward pass needs ``delay`` steps later."""
        random = torch.get_rng_state()
        passage = Passage(inputs, (), self._weights(name), random)
        passage.outputs = tuple(functional_call(module, passage.weights, inputs))
        self._passages.setdefault(name, {})[self.step + delay] = passage
        return passage.outputs

    def _weights(self, name: str) -> dict[str, Tensor]:
        """Return copies of a partition's parameters; those of the last passage where nothing was updated since."""
        own = {path: self.model.get_parameter(path) for path in self.parameters.get(name, ())}
        own = {path: each for path, each in own.items() if each.requires_grad}
        kept = self._passages.get(name, {})
        latest = kept[max(kept)].weights if kept else {}
        if latest.keys() == own.keys() and all(torch.equal(latest[path], each) for path, each in own.items()):
            return latest
        return {path: each.detach().clone().requires_grad_() for path, each in own.items()}

    def backward(
        self, name: str, module: nn.Module, boundaries: Sequence[tuple[str, Sequence[int], Sequence[int]]]
    ) -> None:
        """Make the backward pass that is due, with the gradients that have come back; in the first steps there is none.

        Args:
            name: The partition.
            module: Its graph, to make a forward pass again after a run was resumed.
            boundaries: Each boundary that it produces: the key, the consumers in the order in which gradients are added, and the
                places of the boundary's values among the outputs.
        """
        passage = self._passages.get(name, {}).pop(self.step, None)
        if passage is None:
            return
        if not passage.known:
            self._again(name, module, passage)
        tensors: list[Tensor] = []
        gradients: list[Tensor] = []
        for key, consumers, places in boundaries:
            given = self._gradients.get(key, {}).pop(self.step)
            for position, place in enumerate(places):
                tensors.append(passage.outputs[place])
                gradients.append(summed(tensors[-1], [given[each][position] for each in consumers]))
        backpropagate(tensors, gradients)
        for path, weight in passage.weights.items():
            parameter, gradient, weight.grad = self.model.get_parameter(path), weight.grad, None
            if gradient is not None:
                gradient = corrected(gradient, parameter.detach() - weight.detach(), self.corrections.get(name, 0.0))
                parameter.grad = gradient if parameter.grad is None else added(parameter.grad, gradient)
        self._done[name] = passage

    def _again(self, name: str, module: nn.Module, passage: Passage) -> None:
        """Make a forward pass again, as it was before the run was saved.

        Raises:
            StateError: It gives other values.
        """
        held = ((path, each) for path, each in module.named_buffers() if not isinstance(each, Absent))
        copies = {path: each.detach().clone() for path, each in held}
        present, saved = torch.get_rng_state(), passage.outputs
        torch.set_rng_state(passage.random)
        try:
            passage.outputs = tuple(functional_call(module, {**copies, **passage.weights}, passage.inputs))
        finally:
            torch.set_rng_state(present)
        for made, before in zip(passage.outputs, saved, strict=True):
            if isinstance(made, Tensor) and not torch.equal(made, before):
                raise StateError(OTHER_OUTPUTS.format(name=name))

    def due(self, name: str) -> bool:
        """Whether a partition has made a backward pass in this step."""
        return name in self._done

    def given(self, name: str, places: Sequence[int | None]) -> Gradients:
        """Return the gradients that the partition's backward pass of this step gave to some of its inputs."""
        passage = self._done.get(name)
        return tuple(None if passage is None or place is None else passage.inputs[place].grad for place in places)

    def file(self, key: str, delay: int, consumer: int, own: int, gradients: Gradients, sent: int = 0) -> None:
        """Keep what a consumer gave to a boundary until the producer's backward pass.

        Args:
            key: The boundary.
            delay: That of the producer's backward pass.
            consumer: The partition that gave it.
            own: The delay of the consumer's backward pass.
            gradients: One for each value.
            sent: How many steps ago it was given.
        """
        batch = self.step - sent - own
        if batch >= 0:
            copies = tuple(None if each is None else each.detach() for each in gradients)
            self._gradients.setdefault(key, {}).setdefault(batch + delay, {})[consumer] = copies

    def receive(
        self,
        key: str,
        delay: int,
        peer: int,
        lag: int,
        route: Route,
        receive: Callable[[], Sequence[Tensor | None]],
    ) -> None:
        """Receive what the consumers on another rank gave ``lag`` steps ago, unless it is here.

        Args:
            key: The boundary.
            delay: That of the producer's backward pass.
            peer: The rank.
            lag: How many steps ago it was sent.
            route: What comes.
            receive: Receives them.
        """
        _, senders, count = route
        self._routes[key, peer] = delay, lag, route
        known = self._gradients.get(key, {})
        wanted = [
            (place, consumer, own)
            for place, (consumer, own) in enumerate(senders)
            if self.step - lag - own >= 0 and consumer not in known.get(self.step - lag - own + delay, {})
        ]
        if wanted:
            found = list(receive())
            for place, consumer, own in wanted:
                self.file(key, delay, consumer, own, tuple(found[place * count : (place + 1) * count]), lag)

    def complete(self, steps: int, receive: Callable[[int, int, int], Sequence[Tensor | None]]) -> None:
        """Receive all that is under way after ``steps`` steps.

        Args:
            steps: How many steps were made.
            receive: From a boundary, a rank and how many steps ago it was sent to what was sent.
        """
        for (key, peer), (delay, lag, route) in self._routes.items():
            for sent in range(max(0, steps - lag), steps):
                self.step = sent + lag
                self.receive(key, delay, peer, lag, route, partial(receive, route[0], peer, steps - sent))

    def state_dict(self, partitions: Collection[str] | None = None, keys: Collection[str] = ()) -> dict[str, Any]:
        """Return what is under way, as plain values.

        Args:
            partitions: Those whose passages are wanted; all by default, with what was taken from other ranks.
            keys: The boundaries that these produce.
        """
        passages = {
            name: {due: each.state_dict() for due, each in kept.items()}
            for name, kept in self._passages.items()
            if partitions is None or name in partitions
        }
        gradients = {
            key: {due: dict(each) for due, each in kept.items()}
            for key, kept in self._gradients.items()
            if partitions is None or key in keys
        }
        for other in self._others if partitions is None else ():
            passages.update(other["passages"])
            gradients.update(other["gradients"])
        return {"passages": passages, "gradients": gradients}

    def take(self, state: Mapping[str, Any]) -> None:
        """Take what another rank has under way, to be saved."""
        self._others.append(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved."""
        self._done, self._others = {}, []
        self._passages = {
            name: {due: restored(each) for due, each in kept.items()} for name, kept in state["passages"].items()
        }
        self._gradients = {
            key: {due: dict(each) for due, each in kept.items()} for key, kept in state["gradients"].items()
        }
