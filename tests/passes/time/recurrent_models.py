"""Random recurrent models, and truncated backpropagation with known estimates, written by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import dnifx

Estimate = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]


class Stacked(nn.Module):
    """An nn.RNN, nn.GRU or nn.LSTM with a readout; its state is [layers, batch, width]."""

    def __init__(self, kind: type[nn.RNN | nn.GRU | nn.LSTM], layers: int, batch_first: bool) -> None:
        super().__init__()
        self.core = kind(3, 4, layers, batch_first=batch_first)
        self.readout = nn.Linear(4, 2)
        self.batch_first = batch_first

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, left = self.core(x if self.batch_first else x.transpose(0, 1), state)
        y = self.readout(y)
        return y if self.batch_first else y.transpose(0, 1), left


class Looped(nn.Module):
    """A cell in a Python loop, and beside it a second state: a leaky trace of what it gave, and a count of steps."""

    def __init__(self, kind: type[nn.RNNCell | nn.GRUCell | nn.LSTMCell], steps: int) -> None:
        super().__init__()
        self.cell = kind(3, 4)
        self.lift = nn.Linear(5, 4)
        self.readout = nn.Linear(9, 2)
        self.steps = steps

    def forward(self, x: Tensor, memory: dict[str, Any]) -> dict[str, Any]:
        state, trace, count = memory["core"], memory["trace"], memory["count"]
        outputs = []
        for time in range(self.steps):
            state = self.cell(x[:, time], state)
            hidden = state[0] if isinstance(state, tuple) else state
            trace = 0.5 * trace + torch.tanh(torch.cat([hidden, trace[:, :1]], 1) @ self.lift.weight.t())
            outputs.append(self.readout(torch.cat([hidden, trace, count[:, None].to(x.dtype)], 1)))
            count = count + 1
        return {"y": torch.stack(outputs, 1), "left": {"core": state, "trace": trace, "count": count}}


@dataclass(frozen=True)
class Case:
    """A recurrent model, its cut in time and windows of data.

    Attributes:
        model: The model, in double precision.
        cut: The cut in time.
        state: The first state.
        inputs: One [batch, steps, 3] a window.
        targets: One [batch, steps, 2] a window.
        where: From an output to (y, next state).
    """

    model: nn.Module
    cut: dnifx.Recurrent
    state: Any
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    where: Callable[[Any], tuple[Tensor, Any]]

    @property
    def batch(self) -> int:
        return self.inputs[0].size(0)

    def decouple(self, gradient: Any = "synthetic", cuts: Sequence[str] = (), **options: Any) -> dnifx.DecoupledModule:
        args = self.inputs[0], self.state
        return dnifx.decouple(
            self.model, [*cuts, self.cut], args=args, gradient=gradient, loss=loss, verify=False, **options
        )


def loss(output: Any, target: Tensor) -> Tensor:
    """Return the mean over examples of the squared error, summed over a window."""
    y = output if isinstance(output, Tensor) else output["y"]
    return functional.mse_loss(y, target, reduction="sum") / len(y)


@st.composite
def recurrent_cases(draw: st.DrawFn, windows: int = 3, scale: float | None = None) -> Case:
    """Draw a model and its windows."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    batch, steps = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    weight = scale if scale is not None else draw(st.sampled_from([0.1, 1.0]))
    model, state, cut = draw(st.sampled_from([stacked, looped]))(draw, batch, steps, weight)
    where = (lambda output: output) if isinstance(model, Stacked) else (lambda output: (output["y"], output["left"]))
    inputs = tuple(torch.randn(batch, steps, 3, dtype=torch.double) for _ in range(windows))
    targets = tuple(torch.randn(batch, steps, 2, dtype=torch.double) for _ in range(windows))
    return Case(model.double(), cut, state, inputs, targets, where)


def stacked(draw: st.DrawFn, batch: int, steps: int, scale: float) -> tuple[nn.Module, Any, dnifx.Recurrent]:
    kind, layers = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM])), draw(st.integers(1, 2))
    zero = torch.zeros(layers, batch, 4, dtype=torch.double)
    state = (zero, zero) if kind is nn.LSTM else zero
    return Stacked(kind, layers, draw(st.booleans())), state, dnifx.Recurrent("state", "1", scale=scale)


def looped(draw: st.DrawFn, batch: int, steps: int, scale: float) -> tuple[nn.Module, Any, dnifx.Recurrent]:
    kind = draw(st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell]))
    zero = torch.zeros(batch, 4, dtype=torch.double)
    core = (zero, zero) if kind is nn.LSTMCell else zero
    memory = {"core": core, "trace": zero, "count": torch.zeros(batch, dtype=torch.long)}
    return Looped(kind, steps), memory, dnifx.Recurrent("memory", "left", scale=scale)


def floating(state: Any) -> list[Tensor]:
    """Return the differentiable tensors of a state."""
    return [leaf for leaf in pytree.tree_leaves(state) if leaf.is_floating_point()]


def rows_zeroed(state: Any, mask: Tensor, batch: int) -> Any:
    """Return a state in which some examples' rows are zero."""

    def zeroed(value: Tensor) -> Tensor:
        dim = 1 if value.dim() == 3 else 0
        value = value.clone()
        value.transpose(0, dim)[mask] = 0
        return value

    return pytree.tree_map(zeroed, state)


@dataclass
class WindowByHand:
    """What one window gives: its loss, the gradients, what arrived at its first state, and the state that it leaves."""

    loss: Tensor
    gradients: list[Tensor | None]
    arrived: list[Tensor]
    left: Any


def window_by_hand(case: Case, index: int, state: Any, given: Sequence[Tensor] | None = None) -> WindowByHand:
    """Run one window with autograd alone: the state is detached, and ``given`` is added to the gradient of the next one."""
    leaves = pytree.tree_map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), state)
    y, left = case.where(case.model(case.inputs[index], leaves))
    value = loss(y, case.targets[index])
    total = value
    for tensor, gradient in zip(floating(left), given or (), strict=False):
        total = total + (tensor * gradient).sum()
    wanted = [*case.model.parameters(), *floating(leaves)]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    count = len(list(case.model.parameters()))
    arrived = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(floating(leaves), found[count:], strict=True)
    ]
    return WindowByHand(value.detach(), list(found[:count]), arrived, pytree.tree_map(Tensor.detach, left))


def as_state(rows: Tensor, value: Tensor) -> Tensor:
    """Return what ``by_rows`` gave in the shape of the state's tensor."""
    return rows.reshape(value.transpose(0, 1).shape).transpose(0, 1) if value.dim() == 3 else rows


def by_rows(value: Tensor) -> Tensor:
    """Return a state's tensor as estimators see it, [batch, features]."""
    return (value.transpose(0, 1) if value.dim() == 3 else value).reshape(value.size(1 if value.dim() == 3 else 0), -1)
