"""A window of a recurrent model under ``torch.compile``: one graph, and the numbers of the window that is not compiled."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import dnifx
from dnifx.estimators import BPLambda, SyntheticState
from dnifx.zoo.cells import VanillaCell

LINEAR = SyntheticState(hidden=0)


def decoupled(gradient: Any) -> dnifx.DecoupledModule:
    """Return a window of four steps, cut in time."""
    torch.manual_seed(0)
    window = dnifx.unroll(VanillaCell(3, 5, 2), steps=4)
    args = torch.randn(6, 4, 3), torch.zeros(6, 5)
    return dnifx.decouple(window, dnifx.Recurrent("state", "1", scale=0.5), args=args, gradient=gradient)


def train(net: Any, parameters: Any, joined: bool) -> list[Tensor]:
    """Train on three chains of two windows, in which episodes begin; return the losses."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    state, losses = torch.zeros(6, 5), []
    for _ in range(3):
        optimizer.zero_grad()
        total, state = torch.zeros(()), state.detach()
        for _ in range(2):
            x, start = torch.randn(6, 4, 3, generator=generator), torch.rand(6, generator=generator) < 0.3
            y, left = net(x, state, reset=start)
            total = total + mse_loss(y, x[..., :2])
            state = left if joined else left.detach()
        torch.autograd.backward(total)
        optimizer.step()
        losses.append(total.detach())
    return losses


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at the state of a chain
@pytest.mark.parametrize(
    "gradient",
    [pytest.param(LINEAR, id="alone"), pytest.param(BPLambda(0.5, LINEAR), marks=pytest.mark.slow, id="in a chain")],
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_window_compiles_as_one_graph(backend: str, gradient: Any) -> None:
    torch._dynamo.reset()
    plain, joined = decoupled(gradient), isinstance(gradient, BPLambda)
    other = decoupled(gradient)
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    wanted, found = train(plain, plain.parameters(), joined), train(compiled, other.parameters(), joined)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert any(parameter.abs().max() > 0 for parameter in plain.interface_parameters())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
