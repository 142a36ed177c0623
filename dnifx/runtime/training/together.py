"""Estimators that are alike, asked in one call: each of their layers is one batched product for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Together:
    """Asks several estimators of the same layers and sizes in one call.

    Args:
        estimators: All estimators, by boundary key.
    """

    def __init__(self, estimators: Mapping[str, nn.Module]) -> None:
        self.estimators = estimators

    def __call__(
        self, keys: Sequence[str], values: Sequence[tuple[Tensor, ...]], seen: Any
    ) -> list[tuple[Tensor, ...]]:
        """Return the synthetic gradients of several boundaries; a backward pass reaches the parameters of each estimator.

        Args:
            keys: Of which boundaries.
            values: The values of each, in equal shapes.
            seen: What all of them see beside the values.
        """
        named = [dict(self.estimators[key].named_parameters()) for key in keys]
        stacked = {name: torch.stack([each[name] for each in named]) for name in named[0]}
        first = self.estimators[keys[0]]

        def answer(parameters: dict[str, Tensor], own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            made: tuple[Tensor, ...] = functional_call(first, parameters, (own, seen))
            return made

        ask = torch.vmap(answer, randomness="different")
        made = ask(stacked, tuple(map(torch.stack, zip(*values, strict=True))))
        return list(zip(*(each.unbind() for each in made), strict=True))
