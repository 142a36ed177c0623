"""A part as a model of its own: how its graph is called, and a module that runs it on the model's own modules."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.ir import Part, Signature
from dnifx.runtime.net.attach import attach
from dnifx.runtime.net.input_kinds import hold_constants, share_state

STATES = "states"
"""The argument of a part that holds its states, by key."""


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
    plan: Part
    like: Signature
    example: tuple[tuple[Any, ...], Mapping[str, Any]]

    def differences(self, one: Hashable, other: Hashable) -> list[str]:
        """Return nothing: a part has one input kind."""
        return []

    @property
    def varying(self) -> tuple[str, ...]:
        """Nothing: a part holds for the attributes that it was captured with."""
        return ()

    @property
    def kept(self) -> tuple[str, ...]:
        """Nothing: a part keeps nothing in attributes."""
        return ()

    @property
    def results(self) -> tuple[str | None, ...]:
        """Nothing: a part leaves nothing on the model."""
        return ()

    @property
    def left_at(self) -> tuple[str, ...]:
        """Nothing: a part leaves nothing on the model."""
        return ()

    @property
    def changed(self) -> tuple[str, ...]:
        """Nothing: a part changes no attributes."""
        return ()

    @property
    def in_place(self) -> tuple[str, ...]:
        """Nothing: a part changes no attributes."""
        return ()

    @property
    def outside(self) -> tuple[Any, ...]:
        """Nothing: a part changes no variables."""
        return ()

    @property
    def left(self) -> int:
        """Nothing: a part leaves nothing on the model."""
        return 0

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

    def write_back(self, values: tuple[Any, ...]) -> None:
        """Do nothing: a part leaves nothing on the model."""

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        """Identify the input kind of a call: the training flags and types that the capture depends on."""
        return self.like.key(*self.example)


class PartModel(nn.Module):
    """A part of a model, as a module: (what it takes, its states by key) to (results, what it gives, next states by key).

    It shares the model's own modules, parameters and buffers, under their own paths.

    Args:
        model: The whole model.
        graph: The part's graph.
        signature: How it is called.
        constants: Values that the graph reads and the model does not hold.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, signature: PartSignature, constants: Mapping[str, Any]
    ) -> None:
        super().__init__()
        share_state(self, model)
        hold_constants(self, constants)
        self.__dict__.update(signature=signature, graph=attach(graph, self, f"Part{signature.plan.index}"))

    signature: PartSignature
    graph: fx.GraphModule

    def forward(self, values: tuple[Tensor, ...], states: dict[str, Any]) -> Any:
        """Run the part."""
        return self.signature.unflatten(self.graph(*self.signature.flatten((values, states), {})))
