"""Models that write in place, take views, mix dtypes, or have gradients of their own."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_models.hard.pieces import WIDTH, Factory, Stack, embedded, mlp, vectors


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return (x * scale).round() / scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Quantized(nn.Module):
    """A block that rounds straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(_Round.apply(x, 8.0)))  # type: ignore[no-untyped-call]


class Adversarial(nn.Module):
    """A domain head behind a reversed gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(mlp(), nn.ReLU(), mlp(), nn.ReLU())
        self.label, self.domain = mlp(), mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return self.label(h), self.domain(_Reverse.apply(h))  # type: ignore[no-untyped-call]


class MixedDtypes(nn.Module):
    """Blocks in bfloat16 between blocks in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp() if index % 2 else mlp().bfloat16() for index in range(4))
        self.dtypes = [torch.float32 if index % 2 else torch.bfloat16 for index in range(4)]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x.to(block[0].weight.dtype)).to(x.dtype)  # type: ignore[index]
        return x


class Autocast(nn.Module):
    """A region of mixed precision inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in self.blocks:
                x = x + block(x)
        return self.head(x.float())


class InPlace(nn.Module):
    """Writes into what it has been given, in every way there is."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = self.seen  # type: ignore[assignment]
        seen.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        for index, layer in enumerate(self.layers):
            y = layer(x)
            y.mul_(0.5)
            y[:, index] += 1
            y[:, :2] = x[:, :2]
            x = F.gelu(y)
            x += seen
        return x


class Viewed(nn.Module):
    """Views of one value go to several later blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.merge = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for widen, merge in zip(self.widen, self.merge, strict=True):
            query, key, value = widen(x).chunk(3, -1)
            turned = query.view(query.size(0), 4, -1).transpose(1, 2).reshape(x.shape)
            x = merge(turned * key.sigmoid() + value[..., : x.size(-1)])
        return x


class Memory(nn.Module):
    """Reads a memory by content and writes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        memory = x.new_zeros(x.size(0), 4, WIDTH)
        for slot, query in enumerate(self.queries):
            asked = query(x)
            weights = torch.einsum("bsw,bw->bs", memory, asked).softmax(-1)
            memory = memory.clone()
            memory[:, slot] = asked
            x = x + torch.einsum("bs,bsw->bw", weights, memory)
        return x


def memory_family() -> Mapping[str, Factory]:
    """Return models that write in place, view, and mix dtypes."""
    return {
        "in place": lambda: embedded(InPlace()),
        "views": lambda: embedded(Viewed()),
        "memory": lambda: embedded(Memory()),
        "mixed dtypes": lambda: embedded(MixedDtypes()),
        "autocast": lambda: embedded(Autocast()),
        "bfloat16": lambda: (Stack(mlp(), nn.ReLU(), mlp(), mlp()).bfloat16(), (vectors().bfloat16(),), {}),
        "quantized": lambda: embedded(Stack(*(Quantized() for _ in range(4)))),
        "adversarial": lambda: embedded(Adversarial()),
    }
