"""What a trainer refuses in a step: parameters that its optimizers do not hold, and a loss that teaches nothing."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

import dnifx
from dnifx.errors import LossError, StateError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Tied(nn.Module):
    """A model that uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


def made(loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy, gradient: str = "synthetic") -> DecoupledModule:
    torch.manual_seed(0)
    return dnifx.decouple(Tied(), ["first", "second"], args=(X,), gradient=gradient, loss=loss)


def trainer(net: DecoupledModule) -> Trainer:
    return net.trainer(partial(torch.optim.SGD, lr=0.1))


def assign(net: Any) -> None:
    net.load_state_dict({name: each.clone() for name, each in net.state_dict().items()}, assign=True)


def replace(net: Any) -> None:
    net.original.last.bias = nn.Parameter(torch.zeros(3))


def untie(net: Any) -> None:
    net.original.second.weight = nn.Parameter(net.original.second.weight.detach().clone())


def take_out(net: Any) -> None:
    net.original.first.register_parameter("bias", None)


def an_estimator(net: Any) -> None:
    module = next(each for each in net.interfaces.modules() if each._parameters)
    name, value = next(iter(module.named_parameters(recurse=False)))
    setattr(module, name, nn.Parameter(value.detach().clone()))


def cut_out(net: Any) -> None:
    prune.l1_unstructured(net.original.last, "weight", 0.5)


def normalise(net: Any) -> None:
    parametrizations.weight_norm(net.original.last)


CHANGES = [assign, replace, untie, take_out, an_estimator, cut_out, normalise]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "copied", [lambda trainer: trainer, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]
)
def test_a_parameter_that_no_optimizer_holds_is_refused(
    change: Callable[[Any], None], copied: Callable[[Trainer], Trainer]
) -> None:
    one = copied(trainer(made()))
    one.step(X, target=Y)
    change(one.net)
    with pytest.raises(StateError, match=r"the parameter '[\w.]+' was replaced after net.trainer"):
        one.step(X, target=Y)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
        lambda net: net.double().float(),
        lambda net: setattr(net.original.last.bias, "data", torch.zeros(3)),
        lambda net: nn.init.zeros_(net.original.first.weight),
        lambda net: net.original.last.requires_grad_(False),
    ],
    ids=["a state", "another precision", "data", "in place", "frozen"],
)
def test_parameters_may_change_in_place(change: Callable[[Any], object]) -> None:
    one = trainer(made())
    one.step(X, target=Y)
    change(one.net)
    first: Any = one.net.get_submodule("first")
    before = first.weight.detach().clone()
    one.step(X, target=Y)
    assert not torch.equal(first.weight, before)


def anew(output: Tensor, target: Tensor) -> Tensor:
    return torch.tensor(cross_entropy(output, target).item(), requires_grad=True)


def of_another(output: Tensor, target: Tensor) -> Tensor:
    return torch.ones((), requires_grad=True) * 2 + cross_entropy(output.detach(), target)


@pytest.mark.parametrize("loss", [anew, of_another])
@pytest.mark.parametrize("gradient", ["synthetic", "oracle"])
def test_a_loss_that_does_not_reach_the_output_is_refused(
    loss: Callable[[Tensor, Tensor], Tensor], gradient: str
) -> None:
    with pytest.raises(LossError, match="none that reaches the output"):
        trainer(made(loss, gradient)).step(X, target=Y)


def in_place(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output.mul_(2), target)


def of_a_view(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output[:, :2].exp().log(), target % 2)


def with_weights(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output.detach() * torch.ones(3, requires_grad=True), target) + 0 * output.sum()


@pytest.mark.parametrize("loss", [in_place, of_a_view, with_weights])
def test_a_loss_that_reaches_the_output_in_any_way_is_taken(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    trainer(made(loss)).step(X, target=Y)
