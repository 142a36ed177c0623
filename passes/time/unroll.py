"""Unroll: a cell that takes one step becomes a window of several steps, which share its weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError, CutError, nearest
from dnifx.runtime.net.states import follow


class Unrolled(nn.Module):
    """A cell, run for a fixed number of steps: (x, state) -> (outputs, next state).

    ``unroll`` explains the arguments; an empty path leads to the whole of what the cell returns.
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
    """Make a window of several steps from a cell that takes one step at a time.

    The result takes (x, state) and returns (outputs, next state), so ``Recurrent("state", "1")`` cuts it in time. Capture
    makes one graph of it, with ``steps`` copies of the cell that share its parameters.

    Args:
        cell: Takes (input of one step, state).
        steps: Steps of a window, 1 or more.
        output: The path of a step's output in what the cell returns: ``"0"`` by default, and h for torch's own cells.
        next_state: The path of the next state: ``"1"`` by default, and the whole of what torch's own cells return.
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
    """Return the part of a cell's output that a path leads to.

    Raises:
        CutError: The path leads nowhere.
    """
    try:
        return follow(given, path)
    except KeyError as error:
        step, *names = error.args
        raise CutError(
            f"the cell returned nothing at {path!r}: no {step!r} among {nearest(step, names)}; give the paths of its output and "
            "next state: dnifx.unroll(cell, steps, output='0', next_state='1')"
        ) from error
