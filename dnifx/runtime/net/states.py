"""The state of a recurrent model between two windows: found in outputs, carried, reset, put into inputs."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CutError, InputError, StateError, nearest
from dnifx.ir import Program, Recurrent
from dnifx.runtime.emitted.windows import without_rows

_STATE = object()


def steps_of(path: str) -> list[str]:
    """Return the steps of a path: ``batch.state`` is two, the empty path none."""
    return path.split(".") if path else []


def follow(item: Any, path: str) -> Any:
    """Return the part of a structure that a path leads to: keys, positions, attributes.

    Raises:
        KeyError: It leads nowhere; the names at the place where it ends are the error's arguments.
    """
    for step in steps_of(path):
        names = names_in(item)
        if step not in names:
            raise KeyError(step, *names)
        item = names[step]
    return item


def names_in(item: Any) -> dict[str, Any]:
    """Return the parts of a structure by the steps that lead to them."""
    if isinstance(item, Mapping):
        return {str(key): value for key, value in item.items()}
    if isinstance(item, tuple | list):
        fields = getattr(item, "_fields", ())
        return {**{str(place): value for place, value in enumerate(item)}, **dict(zip(fields, item, strict=False))}
    return {} if isinstance(item, Tensor) else dict(getattr(item, "__dict__", {}))


def replaced(item: Any, path: Sequence[str], value: Any) -> Any:
    """Return a structure with another part at a path; containers on the way are copied."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(item, Mapping):
        parts = {key: replaced(part, rest, value) if str(key) == step else part for key, part in item.items()}
        if not rest and step not in map(str, item):
            parts[step] = value
        return parts if type(item) is dict else type(item)(parts)  # type: ignore[call-arg]
    if isinstance(item, tuple | list):
        fields = getattr(item, "_fields", ())
        place = fields.index(step) if step in fields else int(step)
        items = [replaced(part, rest, value) if index == place else part for index, part in enumerate(item)]
        return type(item)(*items) if fields else type(item)(items)
    raise InputError(f"a state inside {type(item).__name__} cannot be replaced; keep it in a tuple, a list or a dict")


def bound_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Match arguments to the parameters of the model's forward; some may be missing."""
    try:
        return inspect.signature(model.forward).bind_partial(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__} cannot be called so: {error}") from error


def state_in(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Recurrent) -> list[Tensor]:
    """Return the tensors of a state among the arguments.

    Raises:
        CutError: The path leads nowhere, or to something that is not made of tensors.
    """
    return state_tensors(
        bound_arguments(model, args, kwargs).arguments, cut.state, cut, f"the inputs of {model_name(model)}"
    )


def state_out(model: nn.Module, output: Any, cut: Recurrent) -> list[Tensor]:
    """Return the tensors of the next state in an output.

    Raises:
        CutError: The path leads nowhere, or to something that is not made of tensors.
    """
    return state_tensors(output, cut.next_state, cut, f"the output of {model_name(model)}")


def state_tensors(item: Any, path: str, cut: Recurrent, where: str) -> list[Tensor]:
    """Return the tensors at a path, in pytree order."""
    try:
        found = pytree.tree_leaves(follow(item, path))
    except KeyError as error:
        step, *names = error.args
        raise CutError(
            f"{cut!r}: {where} has nothing at {path!r}: no {step!r} among {nearest(step, names)}; name arguments, keys and "
            "positions with dots between them"
        ) from error
    if not found or not all(isinstance(leaf, Tensor) for leaf in found):
        kinds = ", ".join(type(leaf).__name__ for leaf in found) or "nothing"
        raise CutError(f"{cut!r}: at {path!r} {where} has {kinds}; a state is a tensor or a structure of tensors")
    return found


def model_name(model: nn.Module) -> str:
    """Name a model in an error text."""
    return type(model).__name__


def with_state(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cut: Recurrent, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which a state is another one."""
    bound = bound_arguments(model, args, kwargs)
    bound.arguments = replaced({**bound.arguments}, steps_of(cut.state), value)
    return split_arguments(bound)


def split_arguments(bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return bound arguments by position and by keyword, in the order of the parameters."""
    order = [key for key in bound.signature.parameters if key in bound.arguments]
    bound.arguments = {key: bound.arguments[key] for key in order}
    missing = [key for key in bound.signature.parameters if key not in bound.arguments]
    if missing:
        return (), dict(bound.arguments)
    return bound.args, bound.kwargs


def with_own_tensors(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which no tensor stands for two of a state: one zero may be given for both h and c."""
    arguments, keywords = args, dict(kwargs)
    for cut in program.recurrents:
        state = follow(bound_arguments(program.model, arguments, keywords).arguments, cut.state)
        leaves = pytree.tree_leaves(state)
        if len(set(map(id, leaves))) < len(leaves):
            state = pytree.tree_map_only(Tensor, Tensor.detach, state)
            arguments, keywords = with_state(program.model, arguments, keywords, cut, state)
    return arguments, keywords


def without_episodes(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments in which the states of the examples that begin an episode are zero."""
    arguments, keywords = args, dict(kwargs)
    for index, cut in enumerate(program.recurrents if mask is not None else ()):
        dims = iter([carry.dim for carry in program.carries if carry.cut == index])
        state = follow(bound_arguments(program.model, arguments, keywords).arguments, cut.state)
        leaves, spec = pytree.tree_flatten(state)
        state = pytree.tree_unflatten([without_rows(leaf, mask, next(dims)) for leaf in leaves], spec)
        arguments, keywords = with_state(program.model, arguments, keywords, cut, state)
    return arguments, keywords


def refuse_without_trainer(program: Program) -> None:
    """Raise InputError where a cut in time needs what was kept of the windows before.

    Raises:
        InputError: Some cut in time asks for it.
    """
    for cut in program.recurrents:
        if cut.into_core or cut.auxiliary or cut.trace is not None:
            raise InputError(
                f"{cut!r}: into_core and auxiliary compute the last window again, and trace goes on from it, which a trainer alone "
                "keeps: train with net.trainer(...).step(...), and evaluate under torch.no_grad()"
            )


class Window:
    """What lies between the window before and the next one.

    Args:
        program: A compiled program; its example inputs say what an empty state looks like.

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
        self.traces: dict[str, Tensor] = {}
        self.passed: dict[str, Tensor] = {}

    def filled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call's arguments with the carried state in them; what is given by the caller stands.

        At the first window, and after ``clear``, the state is zero, in the shapes of the example inputs.
        """
        arguments, keywords = args, dict(kwargs)
        for index, cut in enumerate(self.program.recurrents):
            first, *inside = steps_of(cut.state)
            given = first in bound_arguments(self.program.model, arguments, keywords).arguments
            if given and (not inside or index not in self.states):
                continue
            state = self.states.get(index)
            state = self.empty(cut) if state is None else state
            if inside and not given:
                raise InputError(
                    f"the input {first!r} is missing; give it, with anything in the place of {cut.state!r}"
                )
            arguments, keywords = with_state(self.program.model, arguments, keywords, cut, state)
        return arguments, keywords

    def empty(self, cut: Recurrent) -> Any:
        """Return a state of zeros, like the example's."""
        bound = bound_arguments(self.program.model, self.program.args, self.program.kwargs)
        return pytree.tree_map_only(Tensor, lambda t: torch.zeros_like(t.detach()), follow(bound.arguments, cut.state))

    def leave(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the next state out of an output, detached; keep the inputs where the window is computed again later."""
        if any(cut.into_core or cut.auxiliary for cut in self.program.recurrents):
            self.past = without_episodes(self.program, args, kwargs, self.mask)
        for index, cut in enumerate(self.program.recurrents):
            self.states[index] = pytree.tree_map_only(Tensor, Tensor.detach, follow(output, cut.next_state))
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
        if not self.states:
            return
        rows = reset_rows(mask, self.examples())
        rows = rows.to(pytree.tree_leaves(self.states)[0].device)
        self.mask = rows if self.mask is None else self.mask | rows

    def examples(self) -> int:
        """Return the number of examples of the carried state."""
        carry = self.program.carries[0]
        size: int = pytree.tree_leaves(self.states[carry.cut])[0].size(carry.dim)
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
    rows = torch.ones(examples, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    if rows.dtype != torch.bool or rows.shape != (examples,):
        raise InputError(
            f"reset(mask): got {tuple(rows.shape)} of {rows.dtype}; give one boolean for each of the {examples} examples"
        )
    return rows


def other_leaves(output: Any, cuts: Sequence[Recurrent]) -> list[int]:
    """Return the places, among the leaves of an output, of those that are no state."""
    marked = output
    for cut in cuts:
        state = pytree.tree_map(lambda _: _STATE, follow(output, cut.next_state))
        marked = replaced(marked, steps_of(cut.next_state), state)
    return [place for place, leaf in enumerate(pytree.tree_leaves(marked)) if leaf is not _STATE]
