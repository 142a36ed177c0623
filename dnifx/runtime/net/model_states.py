"""States that a model keeps on itself between windows: read and set by the path of their attribute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dnifx.errors import CutError
from dnifx.ir import Program, Recurrent
from dnifx.runtime.net.kept_attributes import place_of


def state_on(model: nn.Module, cut: Recurrent) -> Any:
    """Return the state that a model keeps.

    Raises:
        CutError: It has no such attribute.
    """
    try:
        holder, name = place_of(model, cut.state)
        return getattr(holder, name)
    except AttributeError as error:
        raise CutError(
            f"{cut!r}: {type(model).__name__} has nothing at {cut.state}: {error}; name an attribute that the model has before its first "
            "call, such as self.rnn.hidden"
        ) from error


def leave_on(model: nn.Module, cut: Recurrent, value: Any) -> None:
    """Let a model keep another state."""
    holder, name = place_of(model, cut.state)
    setattr(holder, name, value)


@contextmanager
def states_put_back(model: nn.Module, cuts: Sequence[Recurrent]) -> Iterator[None]:
    """Let the model keep the states that it has now after the block."""
    before = [(cut, state_on(model, cut)) for cut in cuts if cut.on_model]
    try:
        yield
    finally:
        for cut, state in before:
            leave_on(model, cut, state)


@contextmanager
def with_example_states(program: Program) -> Iterator[None]:
    """Let the model keep the states of the example within the block."""
    with states_put_back(program.model, program.recurrents):
        for index, state in program.kept_states.items():
            leave_on(program.model, program.recurrents[index], state)
        yield
