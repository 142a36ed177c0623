"""What the mistakes are made with: a small net, a trainer, a step, models of a few kinds."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx.runtime.decoupled import DecoupledModule

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Tokens(nn.Module):
    """Takes tokens and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.out(torch.relu(self.embed(x)))
        return found


class Windows(nn.Module):
    """A recurrent model."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.RNN(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.cell(x[:, None], h)
        return self.out(y[:, 0]), h


def model(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def decouple(cuts: Any = "1", module: Any = None, args: Any = (X,), loss: Any = F.cross_entropy, **more: Any) -> Any:
    return dnifx.decouple(model() if module is None else module, cuts, args=args, loss=loss, **more)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def trainer(schedule: Any = "sequential", optimizer: Any = sgd, given: Any = None, **more: Any) -> Any:
    net: DecoupledModule = decouple(**more)
    return net.trainer(optimizer, schedule, **(given or {}))


def step(*args: Any, target: Any = Y, named: Any = None, **more: Any) -> Any:
    return trainer(**more).step(*(args or (X,)), target=target, **(named or {}))


def second_step(x: Any, target: Any, **more: Any) -> Any:
    made = trainer(**more)
    made.step(X, target=Y)
    return made.step(x, target=target)


def windows() -> Any:
    """Return a trainer of a recurrent model that has made a step."""
    made = trainer(cuts=dnifx.Recurrent("h", "1"), module=Windows(), args=(X, torch.zeros(1, 8, 4)))
    made.step(X, target=Y)
    return made


class Answering(nn.Module):
    """An estimator that answers by a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(()))

    def forward(self, values: Any, context: Any = None) -> Any:
        return self.function(values[0], self.weight)


class LaterLoss:
    """A cross entropy for two steps, and something else after them."""

    def __init__(self, later: Any) -> None:
        self.calls, self.later = 0, later

    def __call__(self, output: Tensor, target: Tensor) -> Any:
        self.calls += 1
        return F.cross_entropy(output, target) if self.calls < 3 else self.later(output, target)


def four_steps(later: Any) -> None:
    made = trainer(loss=LaterLoss(later))
    for _ in range(4):
        made.step(X, target=Y)
