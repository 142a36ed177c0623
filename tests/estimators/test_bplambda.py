"""BP(lambda): backpropagation at one end, DNI at the other, and mixtures of both that wait for the next partition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dnifx
from dnifx import schedules
from dnifx.errors import EstimatorError
from dnifx.estimators import BoundarySpec, BPLambda, Oracle, Synthetic, Zero
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.schedules import Lock
from tests.contracts import checks, reference
from tests.contracts.cases import Bent, Case, cases, decoupled
from tests.contracts.running import TARGETS, run

LINEAR = Synthetic(hidden=0)


def make_net(gradient: Any, cuts: Any = ("1",)) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double()
    net = dnifx.decouple(model, list(cuts), args=(x,), gradient=gradient, loss=mse_loss)
    torch.manual_seed(1)
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    return net, x, y


def descend(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def first_change(net: DecoupledModule, x: Tensor, y: Tensor, target: str) -> Tensor:
    """How far one step moves the first layer, over the learning rate: its gradient."""
    weight = net.original.get_parameter("0.weight")
    before = weight.detach().clone()
    take_step(net, x, y, target)
    return (before - weight.detach()) / 0.01


def take_step(net: DecoupledModule, x: Tensor, y: Tensor, target: str) -> None:
    if target == "scheduled":
        net.trainer(descend).step(x, target=y)
        return
    optimizer = descend(net.parameters())
    optimizer.zero_grad()
    torch.autograd.backward(mse_loss(net(x), y))
    optimizer.step()


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=20)
@given(case=cases(training=True))
def test_one_is_backprop_on_random_graphs(target: str, case: Case) -> None:
    net = decoupled(case, BPLambda(1.0, Bent))
    torch.manual_seed(0)
    wanted = reference.step(case.model, case.module(), case.inputs, case.target, case.loss)
    checks.close(run(case, net, target).gradients, wanted.gradients)


class Broken(nn.Module):
    """An estimator that answers with what is no number."""

    def __init__(self, _: BoundarySpec) -> None:
        super().__init__()

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(value, torch.nan) for value in values)


@pytest.mark.parametrize("target", TARGETS)
def test_one_takes_nothing_of_the_estimate(target: str) -> None:
    found = first_change(*make_net(BPLambda(1.0, Broken)), target)
    assert torch.equal(found, first_change(*make_net(Oracle()), target))


@pytest.mark.parametrize("target", TARGETS)
def test_nought_is_dni_bit_for_bit_and_waits_for_nothing(target: str) -> None:
    plain, mixed = make_net(LINEAR, ("1", "3"))[0], make_net(BPLambda(0.0, LINEAR), ("1", "3"))[0]
    x, y = make_net(LINEAR)[1:]
    for _ in range(3):
        take_step(plain, x, y, target)
        take_step(mixed, x, y, target)
    for one, two in zip(plain.parameters(), mixed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not any(interface.locked for interface in mixed.program.interfaces)
    assert schedules.locks(schedules.sequential(mixed.program), mixed.program)[0] == frozenset()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_between_the_gradient_is_the_mixture(target: str, share: float) -> None:
    true = first_change(*make_net(Oracle()), target)
    estimated = first_change(*make_net(LINEAR), target)
    found = first_change(*make_net(BPLambda(share, LINEAR)), target)
    torch.testing.assert_close(found, share * true + (1 - share) * estimated, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(true, estimated)


@pytest.mark.parametrize("target", TARGETS)
def test_an_estimator_that_learns_nothing_is_mixed_too(target: str) -> None:
    true = first_change(*make_net(Oracle()), target)
    found = first_change(*make_net(BPLambda(0.25, Zero())), target)
    torch.testing.assert_close(found, 0.25 * true, rtol=1e-9, atol=1e-11)


def test_both_targets_agree_and_the_estimator_is_fitted() -> None:
    nets = [make_net(BPLambda(0.5, LINEAR), ("1", "3")) for _ in TARGETS]
    before = [parameter.detach().clone() for parameter in nets[0][0].interface_parameters()]
    for _ in range(5):
        for target, (net, x, y) in zip(TARGETS, nets, strict=True):
            take_step(net, x, y, target)
    for one, two in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    after = list(nets[0][0].interface_parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_schedule_holds_the_lock_that_it_needs_and_reports_say_so() -> None:
    net, _, _ = make_net(BPLambda(0.5, LINEAR), ("1", "3"))
    order = str(schedules.sequential(net.program)).split()
    assert order.index("T0") < order.index("B0")
    assert order.index("S0") < order.index("B0")
    assert Lock.BACKWARD in schedules.locks(schedules.sequential(net.program), net.program)[0]
    assert "locked" in str(net)
    assert net.program.interfaces[0].description.startswith("BPLambda(")
    assert net.program.interfaces[0].description.endswith("estimator=Synthetic(hidden=0))")


def test_a_mapping_mixes_one_boundary_alone() -> None:
    net, x, y = make_net({"1": BPLambda(0.5, LINEAR), "3": LINEAR}, ("1", "3"))
    assert [interface.locked for interface in net.program.interfaces] == [True, False]
    assert torch.isfinite(first_change(net, x, y, "scheduled")).all()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(EstimatorError, match="from 0"):
        BPLambda(share)


def test_an_oracle_is_not_mixed() -> None:
    with pytest.raises(EstimatorError, match="nothing to blend"):
        make_net(BPLambda(0.5, Oracle()))
