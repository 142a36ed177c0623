"""Evaluation mode: the net runs the model itself, with one warning, wherever the evaluation cannot be captured or cut."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import DnifxError, DnifxWarning

X = torch.randn(5, 6)


class Evaluated(nn.Module):
    """Two layers; a subclass says what evaluation does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        result: Tensor = self.second(h if self.training else self.evaluated(x, h))
        return result

    def evaluated(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError


class WritesWhatBackwardNeeds(Evaluated):
    def evaluated(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.exp(h).mul_(0.5).add_(h)


class LeavesTheGraph(Evaluated):
    def evaluated(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.from_numpy(h.detach().numpy() * 2)


class LoopsByValue(Evaluated):
    def evaluated(self, x: Tensor, h: Tensor) -> Tensor:
        while float(h.detach().abs().max()) > 0.01:
            h = h * 0.9
        return h


class HasNoSuchCut(Evaluated):
    def evaluated(self, x: Tensor, h: Tensor) -> Tensor:
        return x[:, :4]


class DifferentiatesInside(Evaluated):
    def evaluated(self, x: Tensor, h: Tensor) -> Tensor:
        place = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.first(place).square().sum(), place)
        return h + slope[:, :4]


MODELS = [WritesWhatBackwardNeeds, LeavesTheGraph, LoopsByValue, HasNoSuchCut, DifferentiatesInside]


@pytest.mark.parametrize("kind", MODELS)
def test_where_evaluation_cannot_be_captured_the_model_runs(kind: type[Evaluated]) -> None:
    model = kind()
    net = dnifx.decouple(model, "first", args=(X,), gradient="zero").eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = [net(X) for _ in range(3)]
    mine = [each for each in told if issubclass(each.category, DnifxWarning)]
    assert all(torch.equal(each, model(X)) for each in made)
    assert len(mine) <= 1
    if mine:
        assert f"in this mode {kind.__name__} runs without its interfaces" in str(mine[0].message)
    assert net.train()(X).requires_grad


class LeavesTheGraphIfAsked(Evaluated):
    def forward(self, x: Tensor, leaves: bool = False) -> Tensor:
        h = self.first(x)
        result: Tensor = self.second(torch.from_numpy(h.detach().numpy() * 2) if leaves and not self.training else h)
        return result


def test_one_kind_of_inputs_that_cannot_be_cut_leaves_the_others_cut() -> None:
    net = dnifx.decouple(LeavesTheGraphIfAsked(), "first", args=(X,), gradient="zero").eval()
    with pytest.warns(DnifxWarning, match="runs without its interfaces"):
        net(X, leaves=True)
    net(X).sum().backward()
    grad = net.get_parameter("first.weight").grad
    assert grad is not None
    assert not grad.any()


def test_the_warning_says_why() -> None:
    net = dnifx.decouple(WritesWhatBackwardNeeds(), "first", args=(X,)).eval()
    with pytest.warns(DnifxWarning, match="modified by an inplace operation"):
        net(X)


def test_who_decouples_or_trains_in_evaluation_mode_is_refused() -> None:
    with pytest.raises(DnifxError, match="fails on the example inputs"):
        dnifx.decouple(WritesWhatBackwardNeeds().eval(), "first", args=(X,))
    net = dnifx.decouple(WritesWhatBackwardNeeds(), "first", args=(X,), loss=nn.functional.mse_loss)
    trainer = net.eval().trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(DnifxError, match="fails for these inputs"):
        trainer.step(X, target=X)


class Core(nn.Module):
    """A recurrent model whose evaluation writes what its backward needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out = nn.GRUCell(6, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return self.out(h if self.training else torch.exp(h).mul_(0.5)), h


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, False, False])])
def test_states_and_episodes_are_those_of_the_call(mask: Any) -> None:
    model, h = Core(), torch.randn(5, 4)
    net = dnifx.decouple(model, dnifx.Recurrent("h", "1"), args=(X, h)).eval()
    with pytest.warns(DnifxWarning, match="runs without its interfaces"):
        made = net(X, h, reset=mask)
    wanted = model(X, h if mask is None else torch.where(mask[:, None], torch.zeros_like(h), h))
    assert all(map(torch.equal, made, wanted))
