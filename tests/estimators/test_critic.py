"""Critics: fitted to the loss of each example, their gradient is the synthetic one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import schedules
from dnifx.errors import EstimatorError, ScheduleError
from dnifx.estimators import BoundarySpec, Critic, Head, Sobolev
from dnifx.ir import TensorSpec
from dnifx.runtime.decoupled import DecoupledModule

KINDS = (Critic(), Sobolev(weight=0.5))


def per_example(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, reduction="none")


def make_net(gradient: Any, loss: Any = per_example, cuts: Any = ("1", "3")) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    net = dnifx.decouple(model, list(cuts), args=(x,), gradient=gradient, context="label", num_classes=3, loss=loss)
    torch.manual_seed(1)
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    return net, x, y


def changes(net: DecoupledModule, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(x, target=y)
    return {name: before[name] - parameter.detach() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("gradient", KINDS)
def test_the_producer_takes_the_gradient_of_the_predicted_loss(gradient: Any) -> None:
    found = changes(*make_net(gradient))
    net, x, y = make_net(gradient)
    head, first = net.program.interfaces[0].estimator.get_submodule("head"), net.original.get_submodule("0")
    predicted = cross_entropy(head((torch.tanh(first(x)),)), y)
    wanted = torch.autograd.grad(predicted, list(first.parameters()))
    torch.testing.assert_close(found["0.weight"], wanted[0])
    torch.testing.assert_close(found["0.bias"], wanted[1])


@pytest.mark.parametrize("gradient", KINDS)
def test_it_is_fitted_to_the_losses_and_with_sobolev_to_the_gradients(gradient: Any) -> None:
    found = changes(*make_net(gradient, cuts=("3",)))
    net, x, y = make_net(gradient, cuts=("3",))
    model, head = net.original, net.program.interfaces[0].estimator.get_submodule("head")
    values = x
    for name in ("0", "1", "2", "3"):
        values = model.get_submodule(name)(values)
    leaf = values.detach().requires_grad_()
    losses = per_example(model.get_submodule("4")(leaf), y)
    (target,) = torch.autograd.grad(losses.sum(), leaf)
    predicted = per_example(head((leaf,)), y)
    fit = (predicted - losses.detach()).square().mean()
    if isinstance(gradient, Sobolev):
        (estimate,) = torch.autograd.grad(predicted.sum(), leaf, create_graph=True)
        fit = fit + 0.5 * (estimate - target).abs().sum(1).mean()
    parameters = dict(head.named_parameters())
    for name, wanted in zip(parameters, torch.autograd.grad(fit, list(parameters.values())), strict=True):
        torch.testing.assert_close(found[f"interfaces.cut_3.head.{name}"], wanted)


def test_of_a_reduced_loss_it_is_told_the_mean() -> None:
    whole, each = changes(*make_net(Critic(), cross_entropy)), changes(*make_net(Critic()))
    torch.testing.assert_close(whole["0.weight"], each["0.weight"])
    assert not torch.allclose(
        whole["interfaces.cut_3.head.layers.0.weight"], each["interfaces.cut_3.head.layers.0.weight"]
    )


def test_it_is_fitted_once_the_last_partition_has_run() -> None:
    critic, sobolev = (make_net(kind)[0].program for kind in KINDS)
    order = str(schedules.sequential(critic)).split()
    assert "T0" not in order
    assert order.index("B0") < order.index("F2") < order.index("M0")
    assert "T0" in str(schedules.sequential(sobolev)).split()
    assert not [lock for lock in schedules.locks(schedules.sequential(critic), critic) if len(lock) > 1]
    early = schedules.parse("F0 S0 M0 B0 U0 F1 S1 B1 U1 F2 M1 B2 U2")
    with pytest.raises(ScheduleError, match="F2"):
        schedules.validate(early, critic)


@pytest.mark.parametrize("gradient", KINDS)
def test_partitions_that_are_idle_leave_it_alone(gradient: Any) -> None:
    net, x, y = make_net(gradient)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), schedules.random_order(0.5))
    for _ in range(10):
        assert trainer.step(x, target=y).loss is not None


@pytest.mark.parametrize("gradient", KINDS)
def test_it_learns_the_loss_and_where_it_falls(gradient: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(256, 8)
    y = x[:, :3].argmax(1)
    options: dict[str, Any] = {"context": "label", "num_classes": 3, "loss": per_example}
    net = dnifx.decouple(model, ["1", "3"], args=(x,), gradient=gradient, **options)
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    results = [trainer.step(x, target=y, diagnose=True) for _ in range(150)]
    first, last = results[0].loss, results[-1].loss
    assert first is not None
    assert last is not None
    assert last < 0.25 * first
    assert results[-1].diagnostics["1"]["cosine"] > 0.5


@pytest.mark.parametrize("gradient", KINDS)
def test_a_forward_alone_does_not_train_it_and_evaluates(gradient: Any) -> None:
    net, x, y = make_net(gradient)
    with pytest.raises(EstimatorError, match=r"net\.trainer"):
        net(x, context=y)
    with torch.no_grad():
        assert torch.equal(net(x), net.original(x))
    assert torch.equal(net.eval()(x), net.original(x))


def test_it_refuses_to_be_without_labels() -> None:
    spec = BoundarySpec("here", (TensorSpec((4, 6), torch.float32),))
    for kind in KINDS:
        with pytest.raises(EstimatorError, match="learns from labels"):
            kind(spec)
    with pytest.raises(EstimatorError, match="above 0"):
        Sobolev(weight=0)


def test_the_first_estimate_is_zero_and_the_first_loss_that_of_chance() -> None:
    spec = BoundarySpec("here", (TensorSpec((4, 6), torch.float32),), context=3, classes=3)
    estimate, loss = Critic(Head(hidden=1))(spec)((torch.randn(4, 6),), torch.eye(3)[[0, 1, 2, 0]])
    assert torch.equal(estimate, torch.zeros(4, 6))
    torch.testing.assert_close(loss, torch.full((4,), 3.0).log())
