"""The state of a recurrent model between two windows: carried, reset, begun anew."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import InputError, StateError
from dnifx.ir import Program, Recurrent
from dnifx.runtime.net.model_states import leave_on, state_on
from dnifx.runtime.net.states import (
    bound_arguments,
    examples_in,
    first_state,
    follow,
    is_none,
    refuse_unknown_none,
    replaced,
    state_out,
    steps_of,
    with_own_tensors,
    with_state,
    without_episodes,
)

_STATE = object()


class Window:
    """What lies between the window before and the next one.

    Args:
        program: A compiled program; its example inputs say what a first state looks like.

    Attributes:
        states: What the last window left, by the number of the cut in time.
        mask: Which examples begin an episode in the next window.
        past: The inputs of the last window, where it is computed again.
        traces: By boundary, the trace that a window takes up; none after a step that did not pass one on.
        passed: What the step that runs passes on.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.states: dict[int, Any] = {}
        self.mask: Tensor | None = None
        self.others: list[int] | None = None
        self.past: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.traces: dict[str, Any] = {}
        self.passed: dict[str, Any] = {}

    def filled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments with the carried state in them; what is given by the caller stands.

        At the first window, and where all examples begin an episode and their number is another one, the state is zero.

        Raises:
            InputError: The carried state is of another number of examples than the inputs, or None is given in its place.
        """
        model, arguments, keywords = self.program.model, args, dict(kwargs)
        self.passed = {}
        sizes = examples_in(self.program, args, kwargs) if self.program.carries else {}
        for index, cut in enumerate(self.program.recurrents):
            if cut.on_model:
                self.fill(index, cut, sizes)
                continue
            first, *inside = steps_of(cut.state)
            given = first in bound_arguments(model, arguments, keywords).arguments
            none = given and is_none(model, arguments, keywords, cut)
            if none and not inside:
                self.refuse_none(index, cut)
            if none and index not in self.states:
                refuse_unknown_none(self.program, cut)
            if given and not none and (not inside or index not in self.states):
                continue
            if inside and not given:
                raise InputError(
                    f"the input {first!r} is missing; give it, with anything in the place of {cut.state!r}"
                )
            if index in self.states and sizes and self.examples() not in sizes:
                self.begin(next(iter(sizes)))
            state = self.states.get(index)
            state = first_state(self.program, index, sizes) if state is None else state
            arguments, keywords = with_state(model, arguments, keywords, cut, state)
        return with_own_tensors(self.program, arguments, keywords)

    def fill(self, index: int, cut: Recurrent, sizes: Mapping[int, None]) -> None:
        """Let the model keep zeros where a stream begins: where its state is None, or all begin anew in another number."""
        if not self.has_state(index):
            refuse_unknown_none(self.program, cut)
            self.mask = None
        elif (sizes and self.examples() not in sizes) or (self.mask is not None and len(self.mask) != self.examples()):
            self.begin(next(iter(sizes), self.examples()))
        else:
            return
        leave_on(self.program.model, cut, first_state(self.program, index, sizes))

    def carried(self, index: int) -> Any:
        """Return the state that the last window left; None before the first."""
        cut = self.program.recurrents[index]
        return state_on(self.program.model, cut) if cut.on_model else self.states.get(index)

    def has_state(self, index: int) -> bool:
        """Whether a state is carried."""
        return any(leaf is not None for leaf in pytree.tree_leaves(self.carried(index)))

    def refuse_none(self, index: int, cut: Recurrent) -> None:
        """Raise InputError where None is given in the place of a state that is carried."""
        if index in self.states and not (self.mask is not None and bool(self.mask.all())):
            raise InputError(
                f"{cut!r}: None is given in the place of a state that is carried; leave it out to go on with the carried state, or "
                "call reset() first to begin anew"
            )

    def begin(self, examples: int) -> None:
        """Drop what was carried, where all its examples begin an episode: the next window has another number of them.

        Raises:
            InputError: Some go on.
        """
        if self.mask is None or not bool(self.mask.all()):
            raise InputError(
                f"the state that is carried is of {self.examples()} examples, and the inputs are of {examples}. Call reset() before "
                "this window to begin anew, or give its own state as an input"
            )
        self.states, self.mask, self.past, self.traces = {}, None, None, {}

    def leave(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], bad: bool | Tensor = False) -> None:
        """Take the next state out of an output, detached; keep the inputs where the window is computed again later.

        Args:
            output: The output of a window.
            args: Its positional inputs.
            kwargs: Its keyword inputs.
            bad: Whether it was not finite. Then the window is as if it had not been: states stay as they were.
        """
        if bad is True:
            self.passed = {}
            return
        before = dict(self.states)
        if any(cut.into_core or cut.auxiliary for cut in self.program.recurrents):
            self.past = without_episodes(self.program, args, kwargs, self.mask)
        for index, cut in enumerate(self.program.recurrents):
            if not cut.on_model:
                self.states[index] = pytree.tree_map_only(Tensor, Tensor.detach, follow(output, cut.next_state))
                if isinstance(bad, Tensor):
                    self.states[index] = unless(bad, before.get(index), self.states[index])
        if isinstance(bad, Tensor):
            self.passed = {key: unless(bad, self.traces.get(key), trace) for key, trace in self.passed.items()}
        self.traces, self.passed = self.passed, {}
        self.mask = None

    def again(self) -> list[Tensor] | None:
        """Return the state that the last window left, computed again with the weights of now; None before the first window.

        Buffers are put back: what the model counts in them, it has counted.
        """
        if self.past is None:
            return None
        buffers = [(buffer, buffer.clone()) for buffer in self.program.model.buffers()]
        args, kwargs = self.past
        output = self.program.model(*args, **kwargs)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return [leaf for cut in self.program.recurrents for leaf in state_out(self.program.model, output, cut)]

    def visible(self, output: Any) -> Any:
        """Return what the loss sees of an output: the one value that is no state, or all of it where there are several."""
        if not self.program.recurrents:
            return output
        if self.others is None:
            self.others = other_leaves(output, self.program.recurrents)
        return pytree.tree_leaves(output)[self.others[0]] if len(self.others) == 1 else output

    def reset(self, mask: Tensor | None) -> None:
        """Mark the rows of the given examples, [batch] and boolean, to start from zero; all of them without a mask.

        Raises:
            InputError: The mask does not fit the state.
        """
        if not self.program.carries or not self.has_state(self.program.carries[0].cut):
            return
        rows = reset_rows(mask, self.examples())
        rows = rows.to(pytree.tree_leaves(self.carried(self.program.carries[0].cut))[0].device)
        self.mask = rows if self.mask is None else self.mask | rows

    def examples(self) -> int:
        """Return the number of examples of the carried state."""
        carry = self.program.carries[0]
        size: int = pytree.tree_leaves(self.carried(carry.cut))[0].size(carry.dim)
        return size

    def state_dict(self) -> dict[str, Any]:
        """Return the carried states and traces, and the rows to reset."""
        return {"states": dict(self.states), "mask": self.mask, "past": self.past, "traces": dict(self.traces)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved states.

        Raises:
            StateError: They are those of other cuts.
        """
        if not set(state["states"]) <= set(range(len(self.program.recurrents))):
            raise StateError(
                f"the saved state has {len(state['states'])} states in time, this trainer {len(self.program.recurrents)}"
            )
        self.states = dict(state["states"])
        self.mask = state["mask"]
        self.past = state.get("past")
        self.traces = dict(state.get("traces", {}))


def reset_rows(mask: Tensor | None, examples: int) -> Tensor:
    """Return the examples that begin an episode, [examples] and boolean; all of them without a mask.

    Raises:
        InputError: The mask does not fit.
    """
    if (mask is not None and not isinstance(mask, Tensor | Sequence)) or isinstance(mask, str):
        raise InputError(f"reset(mask): got {mask!r}; give one boolean for each of the {examples} examples")
    rows = torch.ones(examples, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    if rows.dtype != torch.bool or rows.shape != (examples,):
        raise InputError(
            f"reset(mask): got {tuple(rows.shape)} of {rows.dtype}; give one boolean for each of the {examples} examples"
        )
    return rows


def other_leaves(output: Any, cuts: Sequence[Recurrent]) -> list[int]:
    """Return the places, among the leaves of an output, of those that are no state."""
    marked = output
    for cut in (each for each in cuts if not each.on_model):
        state = pytree.tree_map(lambda _: _STATE, follow(output, cut.next_state))
        marked = replaced(marked, steps_of(cut.next_state), state)
    return [place for place, leaf in enumerate(pytree.tree_leaves(marked)) if leaf is not _STATE]


def unless(bad: Tensor, before: Any, state: Any) -> Any:
    """Return a state, or the one before it, zero where there was none, where a flag on the device says so."""
    if before is None:
        before = pytree.tree_map_only(Tensor, torch.zeros_like, state)
    return pytree.tree_map(
        lambda old, new: torch.where(bad, old, new) if isinstance(new, Tensor) else new, before, state
    )
