"""What the hard models are made of: sizes, inputs, small blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Factory = Callable[[], Example]
WIDTH, TOKENS, LENGTH, BATCH = 16, 32, 6, 3


def vectors() -> Tensor:
    """Return a batch of vectors [batch, width]."""
    return torch.randn(BATCH, WIDTH)


def words() -> Tensor:
    """Return a batch of token ids [batch, length]."""
    return torch.randint(1, TOKENS, (BATCH, LENGTH))


def mlp(width: int = WIDTH, hidden: int = 2 * WIDTH) -> nn.Sequential:
    """Return a block of two layers."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class Stack(nn.Module):
    """Blocks one after the other, and a head."""

    def __init__(self, *blocks: nn.Module, outputs: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def embedded(model: nn.Module) -> Example:
    """Return a model with a batch of vectors."""
    return model, (vectors(),), {}
