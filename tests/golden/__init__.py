"""Golden files of emitted code: ``python -m tests.golden`` writes them anew, ``tests/passes/emit/test_golden.py`` compares."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.estimators import Synthetic
from dnifx.runtime.decoupled import DecoupledModule

FOLDER = Path(__file__).parent
COMMAND = "python -m tests.golden"


class Skips(nn.Module):
    """A convolution, a residual branch that goes round a cut, and a tied pair of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits [batch, 3] of images [batch, 1, 5, 5]."""
        stem = torch.relu(self.norm(self.stem(image)))
        mixed = torch.relu_(self.mix(stem)) + stem
        logits: Tensor = self.head(mixed.mean((2, 3)))
        return logits


def chain() -> DecoupledModule:
    """Return layers in a row, with a synthetic gradient and the paper's label context."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    options: dict[str, Any] = {"context": "label", "num_classes": 3, "loss": cross_entropy}
    return dnifx.decouple(model, ["2", "4"], args=(torch.zeros(4, 6),), gradient=Synthetic(hidden=1), **options)


def skips() -> DecoupledModule:
    """Return a small convolutional net whose cut two values cross, with unlike estimators."""
    gradient = {"norm": Synthetic(hidden=0, kernel=3), "mix": "stale"}
    image = torch.zeros(2, 1, 5, 5)
    return dnifx.decouple(Skips(), ["norm", "mix"], args=(image,), gradient=gradient, loss=cross_entropy)  # type: ignore[arg-type]


MODULES: Mapping[str, Callable[[], DecoupledModule]] = {"chain": chain, "skips": skips}


def emitted(name: str) -> str:
    """Return what the golden file of a module holds: the command that writes it, and the code."""
    return f"# {COMMAND}\n{MODULES[name]().code}"


def write_all() -> list[Path]:
    """Write every golden file."""
    paths = [FOLDER / f"{name}.txt" for name in MODULES]
    for path in paths:
        path.write_text(emitted(path.stem))
    return paths
