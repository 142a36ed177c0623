"""Models that share parameters or modules, freeze some, or compute activations again."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.real_models.hard.pieces import TOKENS, WIDTH, Factory, Stack, embedded, mlp, vectors, words
from tests.real_models.hard.sequences import AttentionByHand


class TiedLanguageModel(nn.Module):
    """Embedding and head are one parameter."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        layer = partial(nn.TransformerEncoderLayer, WIDTH, 4, 32, batch_first=True, dropout=0.1)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.size(1))
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(x)


class CalledAgain(nn.Module):
    """One block is called four times, with something of its own between the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = mlp()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + self.block(norm(x))
        return x


class Siamese(nn.Module):
    """One encoder sees two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(mlp(), nn.Tanh(), mlp(), nn.Tanh(), mlp())
        self.score = nn.Bilinear(WIDTH, WIDTH, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        one, two = self.encoder(left), self.encoder(right)
        return self.score(one, two) + (one * two).sum(-1, keepdim=True)


class LowRank(nn.Module):
    """A frozen linear layer and a trainable correction of low rank (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(F.dropout(x, 0.1, self.training)))


def with_adapters(model: nn.Module) -> nn.Module:
    """Freeze a model and put a correction of low rank on each of its own linear layers."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, LowRank):
                setattr(module, name, LowRank(child))
    return model


class FrozenBackbone(nn.Module):
    """A backbone under no_grad, then a trainable rest."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
        self.rest = nn.Sequential(mlp(), nn.ReLU(), mlp(), nn.ReLU(), mlp())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.rest(x)


class Momentum(nn.Module):
    """A target network follows the online one by a moving average in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(mlp(), nn.ReLU(), mlp(), nn.ReLU(), mlp())
        self.average = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        online = self.last(self.online(x))
        with torch.no_grad():
            target = self.average(x)
        return {"online": online, "distance": 1 - F.cosine_similarity(online, target.detach(), dim=-1)}


class Checkpointed(nn.Module):
    """Blocks whose activations are recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(mlp(), nn.Dropout(0.1)) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def normalised() -> nn.Module:
    """Return layers whose weights are computed from others."""
    blocks = [parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    return Stack(*blocks, parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), mlp(), nn.Tanh())


def shared_family() -> Mapping[str, Factory]:
    """Return models that share, freeze or recompute."""
    return {
        "tied": lambda: (TiedLanguageModel(), (words(),), {}),
        "called again": lambda: embedded(CalledAgain()),
        "siamese": lambda: (Siamese(), (vectors(), vectors()), {}),
        "lora": lambda: embedded(with_adapters(Stack(mlp(), nn.ReLU(), mlp(), nn.ReLU(), mlp()))),
        "lora tied": lambda: (with_adapters(AttentionByHand()), (words(),), {}),
        "frozen backbone": lambda: embedded(FrozenBackbone()),
        "momentum": lambda: embedded(Momentum()),
        "checkpoint reentrant": lambda: embedded(Checkpointed(True)),
        "checkpoint": lambda: embedded(Checkpointed(False)),
        "normalised": lambda: embedded(normalised()),
    }
