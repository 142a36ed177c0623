"""The sigmoid-linear head represents the gradient of a log loss exactly, which a linear one cannot."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import dnifx
from dnifx.errors import EstimatorError
from dnifx.estimators import BoundarySpec, SigmoidLinear, Synthetic
from dnifx.ir import TensorSpec
from dnifx.zoo import CNN


def spec(*shape: int, context: int | None = 2) -> BoundarySpec:
    return BoundarySpec("here", (TensorSpec(shape, torch.float64),), context=context)


def log_loss_gradient(values: Tensor, label: Tensor, theta: Tensor) -> Tensor:
    leaf = values.clone().requires_grad_()
    loss = binary_cross_entropy_with_logits(leaf @ theta, label, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


def example() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    values, theta = torch.randn(64, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    return values, torch.randint(2, (64, 2)).double(), theta


def test_it_holds_the_gradient_of_a_log_loss() -> None:
    values, label, theta = example()
    estimator = SigmoidLinear()(spec(64, 5)).double()
    parameters = dict(estimator.named_parameters())
    with torch.no_grad():
        parameters["models.0.logits.weight"].copy_(theta.T)
        parameters["models.0.logits.bias"].zero_()
        parameters["models.0.mixture.weight"].copy_(theta)
        parameters["models.0.label.weight"].copy_(-theta)
    torch.testing.assert_close(estimator((values,), label)[0], log_loss_gradient(values, label, theta))


def test_it_learns_that_gradient_better_than_a_linear_one() -> None:
    values, label, theta = example()
    target = log_loss_gradient(values, label, 2 * theta)
    errors = []
    for factory in (SigmoidLinear(), Synthetic(hidden=0)):
        torch.manual_seed(1)
        estimator = factory(spec(64, 5)).double()
        optimizer = torch.optim.Adam(estimator.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            error = (estimator((values,), label)[0] - target).square().mean()
            torch.autograd.backward(error)
            optimizer.step()
        errors.append(error.item())
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 3, 5, 2)])
def test_the_first_estimate_is_zero_with_and_without_labels(shape: tuple[int, ...], context: int | None) -> None:
    estimator = SigmoidLinear(width=7)(spec(*shape, context=context)).double()
    label = None if context is None else torch.ones(4, 2)
    (answer,) = estimator((torch.randn(shape, dtype=torch.float64),), label)
    assert torch.equal(answer, torch.zeros(shape, dtype=torch.float64))


def test_a_label_an_example_reaches_every_token() -> None:
    estimator = SigmoidLinear()(spec(4, 3, 5)).double()
    with torch.no_grad():
        dict(estimator.named_parameters())["models.0.label.weight"].fill_(1.0)
    label = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]])
    (answer,) = estimator((torch.zeros(4, 3, 5, dtype=torch.float64),), label)
    assert torch.equal(answer, torch.arange(1.0, 5).double()[:, None, None].expand(4, 3, 5))


def test_of_a_map_it_holds_the_gradient_of_a_classifier_over_all_of_it() -> None:
    torch.manual_seed(0)
    maps, label = torch.randn(8, 3, 4, 2, dtype=torch.float64), torch.randint(2, (8, 2)).double()
    theta = torch.randn(3 * 4 * 2, 2, dtype=torch.float64)
    expected = log_loss_gradient(maps.flatten(1), label, theta).view_as(maps)
    estimator = SigmoidLinear()(spec(8, 3, 4, 2)).double()
    by_position = theta.view(3, 4, 2, 2).movedim(0, 2).reshape(-1, 2)
    parameters = dict(estimator.named_parameters())
    with torch.no_grad():
        parameters["models.0.model.logits.weight"].copy_(by_position.T)
        parameters["models.0.model.logits.bias"].zero_()
        parameters["models.0.model.mixture.weight"].copy_(by_position)
        parameters["models.0.model.label.weight"].copy_(-by_position)
    torch.testing.assert_close(estimator((maps,), label)[0], expected)
    innermost = maps.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(estimator((innermost,), label)[0], expected)


def test_of_maps_a_folder_trains_as_the_net_does(packages: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    net = dnifx.decouple(
        CNN((3, 8, 8), layers=3, filters=4),
        "hidden.*",
        args=(x,),
        gradient="sigmoid_linear",
        context="label",
        num_classes=10,
        loss=cross_entropy,
    )
    net.to_folder(packages / "emitted_maps")
    package = importlib.import_module("emitted_maps")
    emitted = package.Net()
    theirs, ours = package.Trainer(emitted, descend, cross_entropy), net.trainer(descend)
    for _ in range(3):
        theirs.step(x, y, y)
        ours.step(x, target=y)
    found, wanted = emitted.state_dict(), net.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())
    assert any(key.endswith("label.weight") and bool(tensor.any()) for key, tensor in found.items())


def descend(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_it_refuses_volumes() -> None:
    with pytest.raises(EstimatorError, match="Synthetic"):
        SigmoidLinear()(spec(4, 3, 8, 8, 8))
