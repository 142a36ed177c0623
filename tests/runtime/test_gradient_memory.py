"""Several backward passes of a step may add to one leaf, and autograd may keep the gradients of two leaves in one memory."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dnifx

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Values(nn.Module):
    """Two values meet in one sum, behind a partition that reads the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, 4]."""
        first = self.first(x)
        second = self.second(first)
        third = self.third(first).tanh()
        return self.last(torch.stack([first, second]).sum(0) * third)


class Parameters(nn.Module):
    """Two parameters meet in one sum, behind a partition that reads the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, 4]."""
        hidden = self.first(x * self.one).tanh()
        return self.last(hidden) * (torch.stack([self.one, self.other]).sum(0)).tanh()


CASES = ((Values, ["first", "second", "third"]), (Parameters, ["first"]))


def changes(before: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return by how much each parameter fell."""
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def built(kind: type[nn.Module]) -> nn.Module:
    """Return a fresh model in double precision."""
    torch.manual_seed(0)
    return kind().double()


def backprop(kind: type[nn.Module]) -> dict[str, Tensor]:
    """Return the gradients of plain backpropagation."""
    model = built(kind)
    nn.functional.mse_loss(model(X), Y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def descend(parameters: object) -> torch.optim.Optimizer:
    """Return an optimizer that takes each gradient off as it is."""
    return torch.optim.SGD(parameters, lr=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "cuts"), CASES)
def test_adding_to_one_gradient_leaves_the_other_as_it_is(kind: type[nn.Module], cuts: list[str]) -> None:
    model = built(kind)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    net = dnifx.decouple(model, cuts, args=(X,), gradient="oracle", loss=nn.functional.mse_loss)
    net.trainer(descend).step(X, target=Y)
    torch.testing.assert_close(changes(before, model), backprop(kind), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "cuts"), CASES)
def test_a_folder_adds_to_gradients_likewise(
    kind: type[nn.Module], cuts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = dnifx.decouple(built(kind), cuts, args=(X,), gradient="oracle", loss=nn.functional.mse_loss)
    net.to_folder(tmp_path / f"emitted_{kind.__name__.lower()}")
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module(f"emitted_{kind.__name__.lower()}")
    folder = package.Net()
    before = {name: parameter.detach().clone() for name, parameter in folder.named_parameters()}
    package.Trainer(folder, descend, nn.functional.mse_loss).step(X, Y)
    fallen, expected = changes(before, folder), backprop(kind)
    torch.testing.assert_close({name: fallen[name] for name in expected}, expected, rtol=1e-12, atol=1e-14)
