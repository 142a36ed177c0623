"""Unrolling: a cell's window is the cell step by step, weights shared, and it can be cut in time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.errors import CaptureError, CutError, OptionError
from dnifx.zoo.cells import LeakyCell, LSTMCell, VanillaCell

CELLS = {
    "vanilla": lambda: VanillaCell(3, 4, 2),
    "leaky": lambda: LeakyCell(3, 4, 2, leak=0.3),
    "lstm": lambda: LSTMCell(3, 4, 2),
    "torch's lstm": lambda: nn.LSTMCell(3, 4),
    "torch's gru": lambda: nn.GRUCell(3, 4),
}


def one_step(cell: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    given_back = cell(x, state)
    if isinstance(cell, nn.LSTMCell):
        return given_back[0], given_back
    return (given_back, given_back) if isinstance(cell, nn.GRUCell) else given_back


@pytest.mark.parametrize("kind", CELLS)
@settings(max_examples=5)
@given(steps=st.integers(1, 4), batch=st.integers(1, 3), time=st.integers(0, 1), seed=st.integers(0, 99))
def test_a_window_is_the_cell_step_by_step(kind: str, steps: int, batch: int, time: int, seed: int) -> None:
    torch.manual_seed(seed)
    cell = CELLS[kind]()
    zero = torch.randn(batch, 4)
    state: Any = (zero, zero.clone()) if "lstm" in kind else zero
    x = torch.randn(steps, batch, 3)
    outputs, left = dnifx.unroll(cell, steps, time=time)(x.transpose(0, time), state)
    expected = []
    for step in range(steps):
        y, state = one_step(cell, x[step], state)
        expected.append(y)
    assert torch.equal(outputs, torch.stack(expected, time))
    assert all(map(torch.equal, left, state)) if isinstance(left, tuple) else torch.equal(left, state)


def test_weights_are_shared_and_the_window_is_cut_in_time() -> None:
    cell = LeakyCell(3, 4, 2)
    window = dnifx.unroll(cell, steps=5)
    assert {id(parameter) for parameter in window.parameters()} == {id(parameter) for parameter in cell.parameters()}
    net = dnifx.decouple(window, dnifx.Recurrent("state", "1"), args=(torch.randn(2, 5, 3), torch.zeros(2, 4)))
    calls = [node for node in net.program.graph.nodes if node.target == "cell.readout"]  # type: ignore[union-attr]
    assert len(calls) == 5
    net(torch.randn(2, 5, 3), torch.zeros(2, 4))[0].sum().backward()
    assert cell.across.weight.grad is not None


def test_what_a_cell_does_not_give_is_named() -> None:
    with pytest.raises(CaptureError, match="expected 1 or more"):
        dnifx.unroll(nn.GRUCell(2, 3), steps=0)
    with pytest.raises(CutError, match="the cell returned nothing at '2': no '2' among '0', '1'"):
        dnifx.unroll(VanillaCell(2, 3, 1), steps=2, next_state="2")(torch.zeros(1, 2, 2), torch.zeros(1, 3))
    with pytest.raises(OptionError, match="leak"):
        LeakyCell(2, 3, 1, leak=0.0)
