"""Recurrent cells that take one step: vanilla and leaky."""

import torch
from torch import Tensor, nn

from dnifx.errors import OptionError


class VanillaCell(nn.Module):
    """The simple recurrent cell, with a readout.

    h_t = tanh(W x_t + U h_{t-1} + b),  y_t = V h_t + c

    Args:
        inputs: Size of an input.
        width: Units.
        outputs: Size of an output.

    >>> y, h = VanillaCell(2, 3, 4)(torch.zeros(5, 2), torch.zeros(5, 3))
    >>> y.shape, h.shape
    (torch.Size([5, 4]), torch.Size([5, 3]))
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.core = nn.RNNCell(inputs, width)
        self.readout = nn.Linear(width, outputs)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [batch, outputs] and the next state [batch, width]."""
        state = self.core(x, state)
        return self.readout(state), state


class LeakyCell(nn.Module):
    """A cell whose units keep part of what they were, with a readout.

    h_t = (1 - leak) h_{t-1} + leak tanh(W x_t + U h_{t-1} + b),  y_t = V h_t + c

    Args:
        inputs: Size of an input.
        width: Units.
        outputs: Size of an output.
        leak: Share of a unit that is new at each step, above 0 and at most 1; 1 is the vanilla cell.

    Raises:
        OptionError: The leak is out of its range.

    References:
        Jaderberg et al. 2017, appendix: DNI "works similarly" for vanilla and leaky networks; no numbers are given.
    """

    def __init__(self, inputs: int, width: int, outputs: int, leak: float = 0.1) -> None:
        super().__init__()
        if not 0 < leak <= 1:
            raise OptionError(f"LeakyCell(): got {leak=}, expected above 0 and at most 1")
        self.inside = nn.Linear(inputs, width)
        self.across = nn.Linear(width, width, bias=False)
        self.readout = nn.Linear(width, outputs)
        self.leak = leak

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [batch, outputs] and the next state [batch, width]."""
        fresh = torch.tanh(self.inside(x) + self.across(state))
        state = (1 - self.leak) * state + self.leak * fresh
        return self.readout(state), state


class LSTMCell(nn.Module):
    """An LSTM cell with a readout.

    Args:
        inputs: Size of an input.
        width: Units.
        outputs: Size of an output.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.core = nn.LSTMCell(inputs, width)
        self.readout = nn.Linear(width, outputs)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output [batch, outputs] and the next state, h and c [batch, width]."""
        hidden, memory = self.core(x, state)
        return self.readout(hidden), (hidden, memory)
