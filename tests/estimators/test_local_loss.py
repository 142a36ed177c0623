"""Decoupled greedy learning: each head has a loss of its own, and needs nothing from later partitions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import schedules
from dnifx.errors import EstimatorError
from dnifx.estimators import BoundarySpec, GradientEstimator, Head, LocalLoss
from dnifx.ir import TensorSpec
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.running import TARGETS


def make_net(mean: bool = True, gradient: Any = None, **options: Any) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    reduction: Any = "mean" if mean else "sum"
    loss = nn.CrossEntropyLoss(reduction=reduction)
    options = {"context": "label", "num_classes": 3, **options}
    net = dnifx.decouple(model, ["1", "3"], args=(x,), gradient=gradient or LocalLoss(), loss=loss, **options)
    torch.manual_seed(1)
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    return net, x, y


def gradients(net: DecoupledModule, x: Tensor, y: Tensor, target: str, mean: bool = True) -> dict[str, Tensor]:
    """The gradients of one step, by parameter name."""
    named = dict(net.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    if target == "scheduled":
        net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(x, target=y)
        return {name: before[name] - parameter.detach() for name, parameter in named.items()}
    torch.autograd.backward(cross_entropy(net(x, context=y), y, reduction="mean" if mean else "sum"))
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_a_block_and_its_head_learn_from_the_heads_loss(target: str, mean: bool) -> None:
    found = gradients(*make_net(mean), target, mean)
    net, x, y = make_net(mean)
    heads = [item.estimator.get_submodule("head") for item in net.program.interfaces]
    model = net.original
    inputs = x
    for number, head in enumerate(heads):
        value = torch.tanh(model.get_submodule(str(2 * number))(inputs.detach()))
        losses = cross_entropy(head((value,)), y, reduction="none")
        own = dict(model.get_submodule(str(2 * number)).named_parameters())
        wanted = torch.autograd.grad(losses.mean() if mean else losses.sum(), list(own.values()), retain_graph=True)
        for name, gradient in zip(own, wanted, strict=True):
            torch.testing.assert_close(found[f"{2 * number}.{name}"], gradient)
        theirs = dict(head.named_parameters())
        wanted = torch.autograd.grad(losses.mean(), list(theirs.values()))
        for name, gradient in zip(theirs, wanted, strict=True):
            key = f"interfaces.{net.boundaries[number].key}.head.{name}"
            torch.testing.assert_close(found[key], gradient)
        inputs = value
    torch.testing.assert_close(found["4.weight"], own_last(net, inputs, y, mean))


def own_last(net: DecoupledModule, inputs: Tensor, y: Tensor, mean: bool) -> Tensor:
    last = net.original.get_submodule("4")
    loss = cross_entropy(last(inputs.detach()), y, reduction="mean" if mean else "sum")
    return torch.autograd.grad(loss, next(last.parameters()))[0]


def test_no_target_is_computed_and_no_lock_is_left() -> None:
    net, _, _ = make_net()
    schedule = schedules.sequential(net.program)
    assert not [action for action in schedule.actions if action.kind == "T"]
    assert str(schedule).split()[:5] == ["F0", "S0", "M0", "B0", "U0"]
    assert all(lock == frozenset({schedules.Lock.FORWARD}) for lock in schedules.locks(schedule, net.program)[1:])
    schedules.validate(schedule, net.program)
    assert "requires_grad_" not in net.code.split("def step")[1]


def test_a_diagnosis_brings_the_targets_nevertheless() -> None:
    net, x, y = make_net()
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    assert set(trainer.step(x, target=y, diagnose=True).diagnostics) == {"1", "3"}


def test_a_partition_may_hold_nothing_that_learns_behind_it() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 3), nn.Softplus()), torch.randn(5, 4), torch.arange(5) % 3
    options: dict[str, Any] = {"context": "label", "num_classes": 3, "loss": cross_entropy}
    net = dnifx.decouple(model, ["0"], args=(x,), gradient=LocalLoss(), **options)
    assert str(net.program.schedule) == "F0 S0 M0 B0 U0 F1"
    assert net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(x, target=y).loss is not None


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 3, 8, 8)])
@pytest.mark.parametrize("hidden", [0, 1])
def test_heads_classify_every_kind_of_value(shape: tuple[int, ...], hidden: int) -> None:
    spec = BoundarySpec("here", (TensorSpec(shape, torch.float32),), context=3, classes=3)
    estimator = LocalLoss(Head(hidden=hidden))(spec)
    assert isinstance(estimator, GradientEstimator)
    value, label = torch.randn(shape), torch.eye(3)[torch.arange(4) % 3]
    (first,) = estimator((value,), label)
    assert torch.equal(first, torch.zeros(shape))
    optimizer = torch.optim.Adam(estimator.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (answer,) = estimator((value,), label)
        torch.autograd.backward(answer, torch.ones_like(answer))
        optimizer.step()
    head = estimator.get_submodule("head")
    assert cross_entropy(head((value,)), label) < 0.5 * torch.log(torch.tensor(3.0))


def test_several_values_are_classified_together() -> None:
    values = (TensorSpec((4, 6), torch.float32), TensorSpec((4, 2, 5, 5), torch.float32))
    estimator = LocalLoss()(BoundarySpec("here", values, context=3, classes=3))
    answer = estimator(tuple(torch.randn(value.shape) for value in values), torch.eye(3)[torch.arange(4) % 3])
    assert [tuple(each.shape) for each in answer] == [value.shape for value in values]


def test_it_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(EstimatorError, match="context='label'"):
        make_net(context=None, num_classes=None)
    with pytest.raises(EstimatorError, match="needs labels"):
        make_net(context=lambda label: torch.eye(3)[label])
    spec = BoundarySpec("here", (TensorSpec((2, 2, 2, 2, 2), torch.float32),), context=3, classes=3)
    with pytest.raises(EstimatorError, match="cut elsewhere"):
        LocalLoss()(spec)
    with pytest.raises(EstimatorError, match="0 or more"):
        Head(hidden=-1)
