"""Recurrent cells in which each entry of the state depends on its own former value alone, for one step."""

import math

import torch
from torch import Tensor, nn

from dnifx.errors import OptionError


class MinGRUCell(nn.Module):
    """A minimal GRU whose gate sees the input alone, with a readout.

    z_t = sigmoid(W_z x_t + b_z),  h_t = (1 - z_t) h_{t-1} + z_t (W_h x_t + b_h),  y_t = V h_t + c

    Args:
        inputs: Size of an input.
        width: Units.
        outputs: Size of an output.
        longest: How many steps the slowest unit keeps what it has seen, 1 or more. At first the units without an input keep it for
            times drawn uniformly from 1 to this.

    Raises:
        OptionError: ``longest`` is out of its range.

    >>> y, h = MinGRUCell(2, 3, 4)(torch.zeros(5, 2), torch.zeros(5, 3))
    >>> y.shape, h.shape
    (torch.Size([5, 4]), torch.Size([5, 3]))

    References:
        Feng et al. 2024, "Were RNNs All We Needed?" (arXiv 2410.01201). Tallec & Ollivier 2018, "Can recurrent neural networks warp
        time?" (arXiv 1804.11188), for the first gates.

    Differs from the paper in: it runs step by step, not as a scan; the readout is here.
    """

    def __init__(self, inputs: int, width: int, outputs: int, longest: float = 10.0) -> None:
        super().__init__()
        if not longest >= 1:
            raise OptionError(f"MinGRUCell(): got {longest=}, expected 1 or more steps")
        self.gate = nn.Linear(inputs, width)
        self.new = nn.Linear(inputs, width)
        self.readout = nn.Linear(width, outputs)
        with torch.no_grad():
            self.gate.bias.copy_(-torch.log(1 + (longest - 1) * torch.rand(width)))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [batch, outputs] and the next state [batch, width]."""
        gate = torch.sigmoid(self.gate(x))
        state = (1 - gate) * state + gate * self.new(x)
        return self.readout(state), state


class LRUCell(nn.Module):
    """A linear recurrent unit: every entry of the state turns and shrinks by itself; with a readout.

    h_t = lambda h_{t-1} + sqrt(1 - |lambda|^2) (B x_t + b),  lambda = exp(-exp(nu) + i theta),  y_t = V [Re h_t, Im h_t] + c

    The state is two real tensors, the real and the imaginary part of h.

    Args:
        inputs: Size of an input.
        width: Complex units.
        outputs: Size of an output.
        shortest: The smallest |lambda| at first, from 0 to 1.
        longest: The largest |lambda| at first.

    Raises:
        OptionError: The rates are out of their range.

    >>> zero = torch.zeros(5, 3)
    >>> y, (real, imaginary) = LRUCell(2, 3, 4)(torch.zeros(5, 2), (zero, zero))
    >>> y.shape, real.shape, imaginary.shape
    (torch.Size([5, 4]), torch.Size([5, 3]), torch.Size([5, 3]))

    References:
        Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349).

    Differs from the paper in: one layer without a skip connection; the input has a bias; it runs step by step.
    """

    def __init__(self, inputs: int, width: int, outputs: int, shortest: float = 0.5, longest: float = 0.99) -> None:
        super().__init__()
        if not 0 < shortest <= longest < 1:
            raise OptionError(f"LRUCell(): got {shortest=}, {longest=}, expected 0 < shortest <= longest < 1")
        self.inside = nn.Linear(inputs, 2 * width)
        squared = shortest**2 + (longest**2 - shortest**2) * torch.rand(width)
        self.decay = nn.Parameter(torch.log(-0.5 * torch.log(squared)))
        self.angle = nn.Parameter(math.pi / 10 * torch.rand(width))
        self.readout = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output [batch, outputs] and the next state, its real and imaginary part, [batch, width] each."""
        real, imaginary = state
        size = torch.exp(-torch.exp(self.decay))
        cosine, sine = size * torch.cos(self.angle), size * torch.sin(self.angle)
        new_real, new_imaginary = (torch.sqrt(1 - size**2).repeat(2) * self.inside(x)).chunk(2, -1)
        left = cosine * real - sine * imaginary + new_real, sine * real + cosine * imaginary + new_imaginary
        return self.readout(torch.cat(left, -1)), left
