"""Nets for the tests of the doctor."""

from typing import Any

import torch
from torch import Tensor, nn

import dnifx


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def target(examples: int = 8) -> Tensor:
    return torch.arange(examples) % 3


def classifier(cuts: Any = 3, examples: int = 8, **options: Any) -> dnifx.DecoupledModule:
    """A small classifier with dropout and running averages, so that a step leaves traces everywhere."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    given: dict[str, Any] = {"loss": nn.functional.cross_entropy, **options}
    return dnifx.decouple(model, cuts, args=(torch.randn(examples, 6),), **given)
