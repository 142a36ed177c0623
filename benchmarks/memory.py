"""The memory that decoupling takes beside a training step of the model, in bytes that torch holds at once.

    python -m benchmarks.memory
    python -m benchmarks.memory --batch 64 --json memory.json

It measures a residual network and a transformer whose activations take much more memory than their parameters.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dnifx
from benchmarks.timing import as_json

PARTS = 2


class Residual(nn.Module):
    """Two convolutions, beside which the input goes unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return torch.relu(x + self.block(x))


def residual_network(batch: int, blocks: int = 6) -> tuple[nn.Module, Tensor]:
    """Return a residual network for images of 32 by 32 pixels, and a batch of them."""
    body = (Residual(16) for _ in range(blocks))
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    return model, torch.randn(batch, 3, 32, 32)


def transformer(batch: int, layers: int = 4) -> tuple[nn.Module, Tensor]:
    """Return a transformer over 64 tokens, and a batch of them."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(16, 64), body, nn.Linear(64, 8)), torch.randn(batch, 64, 16)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return how many bytes torch allocated on the CPU at once during a run, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results: Any = profiled.profiler
    found = [each for each in results.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for _, size in sorted((each.start_ns(), each.nbytes()) for each in found):
        now += size
        most = max(most, now)
    return most


def peaks(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return the peak of a training step, and that of decoupling the model."""

    def step() -> None:
        model(x).square().mean().backward()

    step()
    model.zero_grad()
    stepped = peak_bytes(step)
    model.zero_grad()
    return stepped, peak_bytes(lambda: dnifx.decouple(model, PARTS, args=(x,)))


def main() -> None:
    """Measure both models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="examples in the batch")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    asked = parser.parse_args()
    table = Table("model", "training step, MB", "decouple, MB", "ratio")
    figures = {}
    for make in (residual_network, transformer):
        torch.manual_seed(0)
        step, decoupled = peaks(*make(asked.batch))
        figures[make.__name__] = {"step_bytes": step, "decouple_bytes": decoupled}
        table.add_row(
            make.__name__.replace("_", " "), f"{step / 1e6:.1f}", f"{decoupled / 1e6:.1f}", f"{decoupled / step:.2f}"
        )
    Console().print(table)
    if asked.json:
        asked.json.write_text(as_json("memory", torch.device("cpu"), figures))


if __name__ == "__main__":
    main()
