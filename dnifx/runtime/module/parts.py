"""Parts of a system that fire at different rates: each is a module of its own, over the system's modules."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.ir import CONSTANTS, Boundary, Interface, Program, Signature
from dnifx.runtime.module.attach import attach
from dnifx.runtime.module.input_kinds import hold_constants

STATES = "states"
"""The argument of a part that holds its states, by key."""


@dataclass(frozen=True)
class Take:
    """A tensor that a part takes from outside.

    Attributes:
        name: Its name in the graph.
        source: Index of the part that makes it; None for an input of the system.
        place: Its place among what that part gives to others, or among the system's flat inputs.
    """

    name: str
    source: int | None
    place: int


@dataclass(frozen=True)
class StatePlan:
    """A state of the system that one part carries.

    Attributes:
        key: The part's name for it.
        cut: Index of its cut in time among the system's.
        spec: Its structure.
        count: Number of its tensors.
    """

    key: str
    cut: int
    spec: pytree.TreeSpec
    count: int


@dataclass(frozen=True)
class PartPlan:
    """What a part is made of.

    Attributes:
        index: Its place among the parts, the fastest first.
        every: Windows from one firing to the next.
        takes: What it takes, in the order of its graph's inputs; the states come behind.
        states: Its states.
        results: Places, among the system's flat outputs, of what it computes.
        gives: How many values it gives to slower parts; they come behind the results, and the next states behind them.
        partitions: Indices of its partitions among the system's.
    """

    index: int
    every: int
    takes: tuple[Take, ...]
    states: tuple[StatePlan, ...]
    results: tuple[int, ...]
    gives: int
    partitions: tuple[int, ...]


@dataclass(frozen=True)
class Message:
    """The boundary between two parts: what one gives to another that fires less often.

    Attributes:
        boundary: As schedules and reports know it; specs are those of one message as estimators see it, batch first.
        interface: What stands there.
        source: Index of the part that gives.
        target: Index of the part that takes.
        places: Places of the values among what the source gives.
        inputs: Places of the values among what the target takes.
        scale: What synthetic gradients are multiplied by.
    """

    boundary: Boundary
    interface: Interface
    source: int
    target: int
    places: tuple[int, ...]
    inputs: tuple[int, ...]
    scale: float


@dataclass(frozen=True)
class System:
    """A system of parts.

    Attributes:
        whole: The program of one window, up to its partitions.
        signature: How the system is called.
        outputs: Number of its flat outputs.
        plans: The parts, the fastest first.
        programs: Their programs.
        messages: What crosses between them.
        schedule: All partitions and boundaries under one numbering, as schedules name them.
        places: For each part, the numbers of its own boundaries in that numbering.
    """

    whole: Program
    signature: Signature
    outputs: int
    plans: tuple[PartPlan, ...]
    programs: tuple[Program, ...]
    messages: tuple[Message, ...]
    schedule: Program
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PartSignature:
    """How a part's graph is called.

    Attributes:
        inputs: Names of the graph's placeholders: what is taken, then the states.
        plan: What the part is made of.
        like: The signature of the capture that the part was taken from: modes are part of its key.
        example: The arguments of that capture.
    """

    inputs: tuple[str, ...]
    plan: PartPlan
    like: Signature
    example: tuple[tuple[Any, ...], Mapping[str, Any]]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PartSignature":
        """Return itself: a signature never changes."""
        return self

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return one tensor for each of ``inputs``."""
        values, states = args
        return (*values, *(leaf for plan in self.plan.states for leaf in pytree.tree_leaves(states[plan.key])))

    def unflatten(self, values: tuple[Any, ...]) -> Any:
        """Return (results, what is given to slower parts, next states by key)."""
        count, given = len(self.plan.results), self.plan.gives
        states, rest = {}, list(values[count + given :])
        for plan in self.plan.states:
            states[plan.key] = pytree.tree_unflatten(rest[: plan.count], plan.spec)
            rest = rest[plan.count :]
        return tuple(values[:count]), tuple(values[count : count + given]), states

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Identify the input kind of a call: the training flags and types that the capture depends on."""
        return self.like.key(*self.example)


class Part(nn.Module):
    """A part of a system, as a module: (what it takes, its states by key) to (results, what it gives, next states by key).

    It shares the system's own modules, parameters and buffers, under their own paths.

    Args:
        model: The system.
        graph: The part's graph.
        signature: How it is called.
        constants: Values that the graph reads and the system does not hold.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, signature: PartSignature, constants: Mapping[str, Any]
    ) -> None:
        super().__init__()
        for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[registry] = model.__dict__[registry]
        self._modules.update(model._modules)
        if constants:
            self.add_module(CONSTANTS, nn.Module())
            hold_constants(self.get_submodule(CONSTANTS), constants)
        self.training = model.training
        self.__dict__.update(signature=signature, graph=attach(graph, self, f"Part{signature.plan.index}"))

    signature: PartSignature
    graph: fx.GraphModule

    def forward(self, values: tuple[Tensor, ...], states: dict[str, Any]) -> Any:
        """Run the part."""
        return self.signature.unflatten(self.graph(*self.signature.flatten((values, states), {})))
