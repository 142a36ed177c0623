"""SG + prop: the gradient of the estimator's own loss reaches the producer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import EstimatorError
from dnifx.estimators import BPLambda, LocalLoss, Prop, Synthetic, Zero
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.running import TARGETS

LINEAR = Synthetic(hidden=0)


def sum_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1)


def make_net(gradient: Any, mean: bool = True, cuts: Any = ("0",)) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double()
    reduction: Any = "mean" if mean else "sum"
    net = dnifx.decouple(model, list(cuts), args=(x,), gradient=gradient, loss=sum_loss, reduction=reduction)
    torch.manual_seed(1)
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    return net, x, y


def first_gradient(net: DecoupledModule, x: Tensor, y: Tensor, target: str, mean: bool = True) -> Tensor:
    weight = net.original.get_parameter("0.weight")
    if target == "scheduled":
        before = weight.detach().clone()
        net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(x, target=y)
        return before - weight.detach()
    loss = sum_loss(net(x), y)
    torch.autograd.backward(loss.mean() if mean else loss.sum())
    assert weight.grad is not None
    return weight.grad


def wanted_gradient(alpha: float, mean: bool) -> Tensor:
    """SG + alpha dL_SG/dh, by hand."""
    net, x, y = make_net(LINEAR, mean)
    model, estimator = net.original, net.program.interfaces[0].estimator
    first, rest = model.get_submodule("0"), nn.Sequential(model.get_submodule("1"), model.get_submodule("2"))
    value = first(x)
    leaf = value.detach().requires_grad_()
    (target,) = torch.autograd.grad(sum_loss(rest(leaf), y).sum(), leaf)
    estimate = estimator((leaf,), None)[0]
    (own,) = torch.autograd.grad((estimate - target).square().sum(), leaf)
    scale = 1 / len(x) if mean else 1.0
    torch.autograd.backward(value, scale * (estimate.detach() + alpha * own))
    found = model.get_parameter("0.weight").grad
    assert found is not None
    return found


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_the_producer_receives_the_gradient_of_the_estimators_loss(target: str, mean: bool) -> None:
    found = first_gradient(*make_net(Prop(0.3, LINEAR), mean), target, mean)
    torch.testing.assert_close(found, wanted_gradient(0.3, mean), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, wanted_gradient(0.0, mean))


def test_both_targets_agree_over_steps_and_with_a_mixture() -> None:
    for gradient in (Prop(0.1, LINEAR), BPLambda(0.5, Prop(0.1, LINEAR))):
        (fused, x, y), (scheduled, _, _) = (make_net(gradient, cuts=("0", "1")) for _ in TARGETS)
        optimizer = torch.optim.SGD(fused.parameters(), lr=0.001)
        trainer = scheduled.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.001))
        for _ in range(4):
            optimizer.zero_grad()
            torch.autograd.backward(sum_loss(fused(x), y).mean())
            optimizer.step()
            trainer.step(x, target=y)
        for one, two in zip(fused.parameters(), scheduled.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_it_runs_without_fits() -> None:
    net, x, y = make_net(Prop(0.1, LINEAR))
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.001), dnifx.schedules.fit_every(2))
    before = [parameter.detach().clone() for parameter in net.interface_parameters()]
    trainer.step(x, target=y)
    middle = [parameter.detach().clone() for parameter in net.interface_parameters()]
    trainer.step(x, target=y)
    after = list(net.interface_parameters())
    assert not any(torch.equal(*pair) for pair in zip(before, middle, strict=True))
    assert all(torch.equal(*pair) for pair in zip(middle, after, strict=True))


def test_the_producer_waits() -> None:
    net, _, _ = make_net(Prop(0.1, LINEAR))
    assert net.program.interfaces[0].locked
    order = str(net.program.schedule).split()
    assert order.index("T0") < order.index("B0")


@pytest.mark.parametrize("estimator", [Zero(), LocalLoss()])
def test_it_refuses_an_estimator_that_is_not_fitted_to_the_target(estimator: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    with pytest.raises(EstimatorError, match="fitted to the target"):
        dnifx.decouple(model, ["0"], args=(x,), gradient=Prop(0.1, estimator), context="label", num_classes=2)
    with pytest.raises(EstimatorError, match="above 0"):
        Prop(0.0)
