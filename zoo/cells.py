"""Recurrent cells for one step: vanilla, leaky, LSTM, and LSTM with recurrent batch norm."""

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
    """A cell whose units keep part of their last value, with a readout.

    h_t = (1 - leak) h_{t-1} + leak tanh(W x_t + U h_{t-1} + b),  y_t = V h_t + c

    Args:
        inputs: Size of an input.
        width: Units.
        outputs: Size of an output.
        leak: New share of a unit at each step, above 0 and at most 1; 1 is the vanilla cell.

    Raises:
        OptionError: The leak is out of its range.

    References:
        Jaderberg et al. 2017, appendix: DNI "works similarly" for vanilla and leaky networks. It
        gives no numbers.
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


class BatchNormLSTMCell(nn.Module):
    """An LSTM cell with recurrent batch norm.

    (i, f, g, o) = BN(W_x x; gamma_x) + BN(W_h h; gamma_h) + b
    c' = sigmoid(f) c + sigmoid(i) tanh(g),   h' = sigmoid(o) tanh(BN(c'; gamma_c, beta_c))

    Args:
        inputs: Size of an input.
        width: Units.

    >>> zero = torch.zeros(5, 3)
    >>> h, c = BatchNormLSTMCell(2, 3)(torch.randn(5, 2), (zero, zero))
    >>> h.shape, c.shape
    (torch.Size([5, 3]), torch.Size([5, 3]))

    References:
        Cooijmans et al. 2016, "Recurrent Batch Normalization", arXiv 1603.09025. The gammas start
        at 0.1, as there.

    Differs from the paper in: all steps share their statistics, because streams have no first step;
    the initial weights are PyTorch's.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inside = nn.Linear(inputs, 4 * width, bias=False)
        self.across = nn.Linear(width, 4 * width, bias=False)
        self.norm_inside = nn.BatchNorm1d(4 * width)
        self.norm_across = nn.BatchNorm1d(4 * width)
        self.norm_memory = nn.BatchNorm1d(width)
        self.norm_across.register_parameter("bias", None)
        for norm in (self.norm_inside, self.norm_across, self.norm_memory):
            nn.init.constant_(norm.weight, 0.1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the next state, h and c [batch, width]."""
        hidden, memory = state
        gates = self.norm_inside(self.inside(x)) + self.norm_across(self.across(hidden))
        enter, keep, new, leave = gates.chunk(4, 1)
        memory = torch.sigmoid(keep) * memory + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(self.norm_memory(memory)), memory
