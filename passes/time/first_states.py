"""First states: what a state that is None in the first window means to the model."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import CutError
from dnifx.ir import Program, Recurrent
from dnifx.passes.capture.record.generators import seed
from dnifx.passes.capture.record.outside import restored
from dnifx.passes.capture.record.structure import copied_arguments, tensors_in
from dnifx.runtime.net.model_states import state_on
from dnifx.runtime.net.states import follow, is_none, model_name, state_out, tensors_of, with_state


def with_first_states(program: Program) -> Program:
    """Give a state that is None in the example inputs the shapes of what the first window leaves, and zeros.

    Raises:
        CutError: The model cannot begin with None, or begins with something else than zeros.
    """
    given = program.args, dict(program.kwargs)
    unset = tuple(cut for cut in program.recurrents if is_none(program.model, *given, cut))
    if not unset:
        return program
    begun = run(program, unset)
    for cut in unset:
        if cut.on_model:
            left = begun[1][cut.state]
            tensors_of(left, cut.state, cut, f"after a call {model_name(program.model)}")
        else:
            state_out(program.model, begun[0], cut)
            left = follow(begun[0], cut.next_state)
        zeros = pytree.tree_map_only(Tensor, lambda one: torch.zeros_like(one.detach()), left)
        given = with_state(program.model, *given, cut, zeros)
    filled = replace(program, args=given[0], kwargs=given[1], zero_first=unset)
    if not same(begun, run(filled, unset)):
        raise CutError(
            f"{unset[0]!r}: {model_name(program.model)} starts from something else than zeros where its state is None (a learned "
            "first state, perhaps), which a window cannot be given as its state. Give the first state in args= or kwargs=, and in "
            "the first window of each stream: trainer.step(x, state, target=y)"
        )
    return filled


def run(program: Program, unset: Iterable[Recurrent]) -> tuple[Any, dict[str, Any]]:
    """Run the model on copies of the example inputs, and leave it as it was; return its output and the states on it.

    Raises:
        CutError: It fails.
    """
    args, kwargs = copied_arguments(program.args, program.kwargs)
    with restored(program.model) as kept, kept.watching(), torch.enable_grad():
        seed(0)
        try:
            output = program.model(*args, **kwargs)
            return output, {cut.state: state_on(program.model, cut) for cut in program.recurrents if cut.on_model}
        except Exception as error:
            names = ", ".join(repr(cut.state) for cut in unset)
            raise CutError(
                f"{model_name(program.model)} fails on the example inputs, in which the state {names} is None: "
                f"{type(error).__name__}: {error}; give a first state in args= or kwargs="
            ) from error


def same(first: Any, second: Any) -> bool:
    """Whether two outputs are equal and depend on the same parameters, so that they stay equal when these are trained."""
    (ones, spec), (others, other) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    return spec == other and leaves_of(ones) == leaves_of(others) and all(map(equal, ones, others))


def equal(one: Any, other: Any) -> bool:
    """Whether two leaves of outputs are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one.double(), other.double(), equal_nan=True)
    return type(one) is type(other)


def leaves_of(output: Any) -> set[int]:
    """Return the identities of the tensors that autograd would give a gradient of an output."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for _, tensor in tensors_in(output)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [each for each, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}
