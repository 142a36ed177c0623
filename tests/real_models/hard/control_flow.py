"""Models whose Python decides what runs: experts, layers left out, loops, hooks."""

import random
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_models.hard.pieces import BATCH, WIDTH, Factory, Stack, embedded, mlp, vectors


class Experts(nn.Module):
    """A layer of experts, each of which sees the examples that are routed to it."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(mlp() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if rows.numel() > 0:
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots].unsqueeze(-1))
        return x + out


class DenseExperts(nn.Module):
    """A layer of experts that all see everything, mixed by a gate, with a balancing loss beside the output."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(mlp() for _ in range(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(x).softmax(-1)
        answers = torch.stack([expert(x) for expert in self.experts], -1)
        return x + (answers * gate.unsqueeze(-2)).sum(-1), gate.mean(0).pow(2).sum()


class ExpertModel(nn.Module):
    """Layers of experts; their balancing losses add up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseExperts() for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        balance = torch.zeros(())
        for layer in self.layers:
            x, own = layer(x)
            balance = balance + own
        return x, balance


class StochasticDepth(nn.Module):
    """Leaves itself out by a draw of torch."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.block = mlp()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < self.rate:
            return x
        return x + self.block(x)


class LayerDrop(nn.Module):
    """Leaves itself out by a draw of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.block = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x * 1.0
        return x + self.block(x)


class EarlyExit(nn.Module):
    """Iterates until it has settled, by a decision on values."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(8):
            following = torch.tanh(self.step(state) + x)
            settled = bool((following - state).abs().max() < 0.05)
            state = following
            if settled:
                break
        return state


class SizeDependent(nn.Module):
    """Pads, folds and scales by sizes that Python computes."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            length = x.shape[-1]
            short = -(-length // 4) * 4 - length
            x = F.pad(x, (1, 1 + short))
            x = conv(x)[..., : max(length // 2 + 1, 3)] / length**0.5
        return x.flatten(1).view(len(x), -1, WIDTH).mean(1)


class Hooked(nn.Module):
    """Forward hooks change what blocks give."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(mlp(), nn.ReLU(), mlp(), nn.ReLU(), mlp())
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.body[2].register_forward_hook(lambda module, args, output: output * self.scale)
        self.body[4].register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Ode(nn.Module):
    """An integrator with a Python loop over one field."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.field, self.head = mlp(), mlp(), mlp()

    def forward(self, x: Tensor, steps: int = 4) -> Tensor:
        x = self.stem(x)
        for _ in range(steps):
            middle = x + self.field(x) / (2 * steps)
            x = x + self.field(middle) / steps
        return self.head(x)


def control_family() -> Mapping[str, Factory]:
    """Return models whose Python decides."""
    return {
        "experts": lambda: embedded(Stack(*(Experts() for _ in range(4)))),
        "dense experts": lambda: embedded(ExpertModel()),
        "stochastic depth": lambda: embedded(Stack(*(StochasticDepth(0.3) for _ in range(5)))),
        "layer drop": lambda: embedded(Stack(mlp(), *(LayerDrop() for _ in range(3)), mlp())),
        "early exit": lambda: embedded(Stack(mlp(), EarlyExit(), mlp(), EarlyExit())),
        "sizes": lambda: (SizeDependent(), (torch.randn(BATCH, WIDTH, 21),), {}),
        "hooks": lambda: embedded(Hooked()),
        "ode": lambda: (Ode(), (vectors(),), {"steps": 3}),
    }
