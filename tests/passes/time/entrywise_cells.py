"""Random cells whose state changes entry by entry, and the gradient of all their windows by backpropagation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import dnifx

ACTIVATIONS = (torch.tanh, torch.sigmoid, functional.softplus, functional.silu, torch.sin)


class EntrywiseCell(nn.Module):
    """A cell of one to three tensors that share their places, with parameters of every shape, and a readout.

    Args:
        plan: Drives the structure; every number is read as often as it takes.
        width: Units.
        states: Tensors of the state.
        steps: Steps of a window.
        heads: Whether the state is looked at as [batch, heads, width / heads] on the way.
        encoder: Whether a layer stands before the cell.
        lead: Whether a dimension of 1 stands before the examples of the state.
    """

    def __init__(
        self, plan: Sequence[int], width: int, states: int, steps: int, heads: bool, encoder: bool, lead: bool
    ) -> None:
        super().__init__()
        self.plan, self.steps, self.heads, self.lead = tuple(plan), steps, heads, lead
        self.encoder = nn.Linear(3, 3) if encoder else None
        self.drives = nn.Linear(3, 3 * width)
        self.decay = nn.Parameter(torch.randn(width))
        self.shared = nn.Parameter(torch.randn(()))
        self.mixing = nn.Parameter(torch.randn(3, width))
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.readout = nn.Linear(states * width, 2)

    def changed(self, index: int, state: Sequence[Tensor], drives: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the next value of one tensor of the state."""
        numbers = iter([self.plan[(index + place) % len(self.plan)] for place in range(8)])
        activation = ACTIVATIONS[next(numbers) % len(ACTIVATIONS)]
        gates = torch.sigmoid(self.decay), torch.sigmoid(self.shared), torch.sigmoid(drives[0]), self.frozen.cos()
        gate, other = gates[next(numbers) % 4], state[next(numbers) % len(state)]
        new = (drives[1], activation(drives[2]), torch.tanh(x @ self.mixing), drives[1] * torch.tanh(other))
        kept = (state[index], activation(state[index]), torch.where(other > 0, state[index], 0.5 * state[index]))
        return gate * kept[next(numbers) % 3] + (1 - gate) * new[next(numbers) % 4]

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the outputs [batch, steps, 2] and the next state."""
        leaves, spec = pytree.tree_flatten(state)
        values, outputs = [leaf[0] if self.lead else leaf for leaf in leaves], []
        for step in range(self.steps):
            seen = x[:, step] if self.encoder is None else torch.tanh(self.encoder(x[:, step]))
            drives = self.drives(seen).chunk(3, -1)
            values = [self.changed(index, values, drives, seen) for index in range(len(values))]
            if self.heads:
                values = [torch.tanh(value.unflatten(-1, (2, -1))).flatten(1) for value in values]
            outputs.append(self.readout(torch.cat(values, -1)))
        left = [value.unsqueeze(0) if self.lead else value for value in values]
        return torch.stack(outputs, 1), pytree.tree_unflatten(left, spec)


@dataclass(frozen=True)
class Stream:
    """A cell and the windows of a stream.

    Attributes:
        model: The cell, in double precision.
        state: The first state.
        inputs: [windows, batch, steps, 3].
        targets: [windows, batch, steps, 2].
        begins: Which examples begin an episode, [windows, batch].
        dim: The dimension of the state that counts examples.
    """

    model: EntrywiseCell
    state: Any
    inputs: Tensor
    targets: Tensor
    begins: Tensor
    dim: int

    def decouple(self, gradient: Any = "exact") -> dnifx.DecoupledModule:
        cut = dnifx.Recurrent("state", "1", batch_dim=self.dim)
        return dnifx.decouple(self.model, cut, args=(self.inputs[0], self.state), gradient=gradient, loss=loss)

    def windows(self) -> Any:
        return zip(self.inputs, self.targets, self.begins, strict=True)

    def without(self, state: Any, begins: Tensor) -> Any:
        """Return a state in which the rows of examples that begin an episode are zero."""
        keeps = (~begins).to(torch.double).view(*(1,) * self.dim, -1, 1)
        return pytree.tree_map(lambda leaf: leaf * keeps, state)

    def whole_gradient(self) -> list[Tensor]:
        """Return the gradients of backpropagation through all windows, as a sum over windows."""
        state, total = self.state, torch.zeros((), dtype=torch.double)
        for x, target, begins in self.windows():
            output, state = self.model(x, self.without(state, begins))
            total = total + loss(output, target)
        return list(torch.autograd.grad(total, self.trained(), materialize_grads=True, allow_unused=True))

    def trained(self) -> list[nn.Parameter]:
        return [each for each in self.model.parameters() if each.requires_grad]


def loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target)


@st.composite
def streams(draw: st.DrawFn, windows: int = 6) -> Stream:
    """Draw a cell and a stream of windows."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    plan = draw(st.lists(st.integers(0, 11), min_size=3, max_size=8))
    batch, width, states = draw(st.integers(2, 3)), draw(st.sampled_from([2, 4])), draw(st.integers(1, 3))
    steps, lead = draw(st.sampled_from([1, 1, 2])), draw(st.booleans())
    model = EntrywiseCell(plan, width, states, steps, draw(st.booleans()), draw(st.booleans()), lead).double()
    shape = (1, batch, width) if lead else (batch, width)
    leaves = [0.3 * torch.randn(shape, dtype=torch.double) for _ in range(states)]
    state = leaves[0] if states == 1 else {str(index): leaf for index, leaf in enumerate(leaves)}
    inputs = torch.randn(windows, batch, steps, 3, dtype=torch.double)
    targets = torch.randn(windows, batch, steps, 2, dtype=torch.double)
    begins = torch.rand(windows, batch) < (0.2 if draw(st.booleans()) else 0.0)
    begins[0] = False
    return Stream(model, state, inputs, targets, begins, int(lead))
