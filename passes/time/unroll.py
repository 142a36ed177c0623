"""Unroll: from a cell that takes one step to the window of several, weights shared."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError, CutError, nearest
from dnifx.runtime.module.states import follow


class Unrolled(nn.Module):
    """A cell, run for a fixed number of steps: (x, state) -> (outputs, next state).

    Args:
        cell: Takes (input of one step, state).
        steps: Steps of a window.
        output: Where the output of a step is in what the cell gives; empty where it is all of it.
        next_state: Where the next state is.
        time: The dimension of inputs and outputs that counts steps.

    Attributes:
        cell: The cell; all steps share its parameters.
    """

    def __init__(self, cell: nn.Module, steps: int, output: str, next_state: str, time: int) -> None:
        super().__init__()
        self.cell = cell
        self.steps = steps
        self.output = output
        self.next_state = next_state
        self.time = time

    def forward(self, x: Any, state: Any) -> tuple[Any, Any]:
        """Run the window.

        Args:
            x: The inputs, a tensor or a structure of them, each with a dimension for the steps.
            state: The state that the window starts from.
        """
        outputs = []
        for step in range(self.steps):
            given = self.cell(self.at(x, step), state)
            outputs.append(part(given, self.output))
            state = part(given, self.next_state)
        return pytree.tree_map(lambda *each: torch.stack(each, self.time), *outputs), state

    def at(self, x: Any, step: int) -> Any:
        """Return the inputs of one step."""
        return pytree.tree_map_only(Tensor, lambda each: each.select(self.time, step), x)


def unroll(
    cell: nn.Module, steps: int, *, output: str | None = None, next_state: str | None = None, time: int = 1
) -> Unrolled:
    """Make the window of a cell that takes one step at a time.

    The result takes (x, state) and gives (outputs, next state), so that ``Recurrent("state", "1")`` cuts it in time. Captured,
    it is one graph of ``steps`` copies of the cell that share its parameters.

    Args:
        cell: Takes (input of one step, state).
        steps: Steps of a window, 1 or more.
        output: Where the output of a step is in what the cell gives: ``"0"`` by default; of torch's own cells h.
        next_state: Where the next state is: ``"1"`` by default; of torch's own cells all that they give.
        time: The dimension of inputs and outputs that counts steps.

    Raises:
        CaptureError: The steps are fewer than one.

    >>> window = unroll(nn.GRUCell(2, 3), steps=4)
    >>> outputs, state = window(torch.zeros(5, 4, 2), torch.zeros(5, 3))
    >>> outputs.shape, state.shape
    (torch.Size([5, 4, 3]), torch.Size([5, 3]))
    """
    if steps < 1:
        raise CaptureError(f"unroll({type(cell).__name__}): got {steps=}, expected 1 or more")
    own = isinstance(cell, nn.RNNCellBase)
    plain_output, plain_state = ("0" if isinstance(cell, nn.LSTMCell) else "", "") if own else ("0", "1")
    where = plain_output if output is None else output, plain_state if next_state is None else next_state
    return Unrolled(cell, steps, *where, time)


def part(given: Any, path: str) -> Any:
    """Return a part of what a cell gave.

    Raises:
        CutError: The path leads nowhere.
    """
    try:
        return follow(given, path)
    except KeyError as error:
        step, *names = error.args
        raise CutError(
            f"the cell gave nothing at {path!r}: no {step!r} among {nearest(step, names)}; say where its output and next state "
            "are: dnifx.unroll(cell, steps, output='0', next_state='1')"
        ) from error
