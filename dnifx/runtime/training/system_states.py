"""The states of a system: given by the caller or carried by the part they belong to, and put back into the output."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.ir import Recurrent
from dnifx.runtime.module.parts import PartPlan, System
from dnifx.runtime.module.states import Window, bound_arguments, follow, state_out, steps_of, with_state


class SystemStates:
    """Knows where the states of a system are among its inputs and outputs.

    Args:
        system: The system.
    """

    def __init__(self, system: System) -> None:
        self.whole, self.signature, self.size = system.whole, system.signature, system.outputs
        self.zeros = Window(system.whole)
        marks = tuple(torch.empty(0) for _ in range(self.size))
        order = {id(mark): place for place, mark in enumerate(marks)}
        output = self.signature.unflatten(marks)
        self.places = [[order[id(mark)] for mark in state_out(self.whole.model, output, cut)] for cut in self.cuts]

    @property
    def cuts(self) -> tuple[Recurrent, ...]:
        """The cuts in time of the system."""
        return self.whole.recurrents

    def take(self, plan: PartPlan, window: Window, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Let a part carry the states of its own that the caller gives; one inside a structure, as long as none is carried."""
        bound = bound_arguments(self.whole.model, args, kwargs).arguments
        for index, state in enumerate(plan.states):
            first, *inside = steps_of(self.cuts[state.cut].state)
            if first in bound and not (inside and index in window.states):
                given = follow(bound, self.cuts[state.cut].state)
                window.states[index] = pytree.tree_map_only(Tensor, Tensor.detach, given)

    def flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the system's inputs in the order of its graph; in the places of states stand zeros."""
        bound = bound_arguments(self.whole.model, args, kwargs).arguments
        for cut in self.cuts:
            if steps_of(cut.state)[0] in bound:
                args, kwargs = with_state(self.whole.model, args, kwargs, cut, self.zeros.empty(cut))
        return self.signature.flatten(*self.zeros.filled(args, kwargs))

    def given(self, plan: PartPlan, window: Window) -> dict[str, Any]:
        """Return the states that a part's firing starts from where it carries none yet, by key; carried ones take their place."""
        return {
            state.key: None if index in window.states else self.zeros.empty(self.cuts[state.cut])
            for index, state in enumerate(plan.states)
        }

    def write(self, plan: PartPlan, window: Window, flat: list[Any]) -> None:
        """Write what a part carries into the flat outputs."""
        for index, state in enumerate(plan.states):
            for place, leaf in zip(self.places[state.cut], pytree.tree_leaves(window.states[index]), strict=True):
                flat[place] = leaf

    def output(self, flat: Sequence[Any]) -> Any:
        """Return the system's output in its own structure."""
        return self.signature.unflatten(tuple(flat))
