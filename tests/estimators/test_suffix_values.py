"""What a suffix takes: values that are written in place where a block was left out, and what crosses without a gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.estimators import Suffix

X, Y = torch.randn(6, 5), torch.arange(6) % 3


def layered(inplace: bool, activation: type[nn.Module]) -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), activation(inplace=inplace))]
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *layers, nn.Linear(8, 3))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardtanh])
@pytest.mark.parametrize("blocks", [0, 1])
def test_an_activation_in_place_behind_a_block_that_was_left_out_writes_to_a_copy(
    blocks: int, activation: type[nn.Module]
) -> None:
    """Against the same model with activations out of place."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = layered(inplace, activation)
        net = dnifx.decouple(model, "1", args=(X,), gradient=Suffix(blocks=blocks), loss=cross_entropy)
        trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        for _ in range(3):
            trainer.step(X, target=Y)
        torch.autograd.backward(cross_entropy(net(X, target=Y), Y))
        found.append({name: (value, value.grad) for name, value in net.named_parameters()})
    for name, (value, gradient) in found[0].items():
        torch.testing.assert_close(found[1][name][0], value)
        torch.testing.assert_close(found[1][name][1], gradient)


class Picks(nn.Module):
    """Gives its values on, and which of them count; this is computed from the values and from zeros of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(5, 8), kind

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.tanh(self.layer(x))
        score = values.sum(1) + values.new_zeros(len(x))
        return values, score.topk(4).indices if self.kind == "indices" else score > score.mean()


class Picked(nn.Module):
    """Classifies some of the values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = Picks(kind), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        values, picked = self.first(x)
        if self.first.kind == "indices":
            return self.last(values[picked])
        return self.last(values * picked.unsqueeze(1))


def some(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target[: len(logits)])


@pytest.mark.parametrize("kind", ["indices", "mask"])
def test_what_crosses_without_a_gradient_is_read_and_not_computed_again(kind: str) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(Picked(kind), "first", args=(X,), gradient="suffix", loss=some)
    (interface,) = net.program.interfaces
    assert len(interface.reads) == 1
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    found = trainer.probe(X, target=Y).true["first"]
    assert float(found["relative_error"]) < 1e-5
    assert float(found["parameter_cosine"]) == pytest.approx(1)
    for _ in range(2):
        trainer.step(X, target=Y)
    torch.autograd.backward(some(net(X, target=Y), Y))
