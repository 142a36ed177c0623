"""Which output of a model is a loss that the model computes itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnifx.passes.emit.loss_scale import loss_places
from tests.passes.programs import compiled

X = torch.randn(4, 6)


class Returns(nn.Module):
    """Returns what a function makes of a hidden layer and of the logits behind it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        return self.function(hidden, self.last(torch.tanh(hidden)))


def twice(hidden: Tensor, logits: Tensor) -> Any:
    loss = logits.exp().mean()
    return loss, logits, loss


@pytest.mark.parametrize(
    ("function", "places"),
    [
        (lambda hidden, logits: logits, []),
        (lambda hidden, logits: logits.mean(), [0]),
        (lambda hidden, logits: (logits, logits.exp().mean()), [1]),
        (lambda hidden, logits: (logits.exp().mean(), logits, hidden), [0]),
        (twice, [0, 2]),
        (lambda hidden, logits: (logits.exp().mean(), hidden.mean()), []),
        (lambda hidden, logits: (logits, hidden.mean()), []),
        (lambda hidden, logits: (logits, logits.mean(1)), []),
        (lambda hidden, logits: (logits.exp().mean(), logits.detach(), hidden.detach().mean()), [0]),
    ],
)
def test_the_loss_is_the_scalar_that_all_other_outputs_are_on_the_way_to(
    function: Callable[[Tensor, Tensor], Any], places: list[int]
) -> None:
    assert loss_places(compiled(Returns(function), ["first"], X, until="insert")) == places
