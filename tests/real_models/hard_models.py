"""Plain models, each with something that is hard to capture or to cut: control flow, sharing, freezing, memory, containers."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

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


class DictBlock(nn.Module):
    """Takes and gives a dictionary of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.edge = mlp(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        node = state["node"] + self.node(state["node"])
        return {"node": node, "edge": torch.tanh(self.edge(torch.cat([node, state["edge"]], -1)))}


@dataclass
class Pair:
    """What the dataclass blocks pass on."""

    main: Tensor
    side: Tensor | None = None
    count: int = 0


class PairBlock(nn.Module):
    """Takes and gives a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: Pair) -> Pair:
        side = pair.main if pair.side is None else pair.side
        return Pair(pair.main + self.main(pair.main), torch.tanh(self.side(side)), pair.count + 1)


class DictModel(nn.Module):
    """Dictionaries all along; the output is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DictBlock() for _ in range(4))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(batch)
        for block in self.blocks:
            state = block(state)
        return state


class PairModel(nn.Module):
    """Dataclasses all along, with a field that is None at first and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PairBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Pair:
        pair = Pair(x)
        for block in self.blocks:
            pair = block(pair)
        return pair


class ListInput(nn.Module):
    """A list of unlike tensors and an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(width, WIDTH) for width in (4, 8, 12))
        self.body = nn.Sequential(mlp(), nn.GELU(), mlp(), nn.GELU(), mlp())

    def forward(self, parts: list[Tensor], weight: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        encoded = [encoder(part) for encoder, part in zip(self.encoders, parts, strict=True)]
        mixed = (
            torch.stack(encoded).mean(0) if weight is None else torch.einsum("pbw,bp->bw", torch.stack(encoded), weight)
        )
        return self.body(mixed) * scale


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


class RecurrentModel(nn.Module):
    """Embedding, recurrent layers and a head; the states are given out too."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(kind(WIDTH, WIDTH, batch_first=True) for _ in range(3))  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        x, states = self.embedding(ids), []
        for layer in self.layers:
            x, state = layer(x)
            states.append(state)
        return self.head(x), states


class Packed(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.before, self.core = mlp(), nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.after = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), mlp())

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.before(self.embedding(ids))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.core(packed)[0], batch_first=True)
        return self.after(x)


class CellLoop(nn.Module):
    """A cell in a Python loop over time, then a body."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.body = nn.Sequential(mlp(), nn.ReLU(), mlp())

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for moment in x.unbind(1):
            state = self.cell(moment, state)
        return self.body(state[0]) if state is not None else x


class AttentionByHand(nn.Module):
    """Multi-head attention written out, causal and with a padding mask; the head is the embedding."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("causal", torch.ones(64, 64).tril().bool(), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        batch, length, width = x.shape
        causal: Tensor = self.causal  # type: ignore[assignment]
        for projection in self.projections:
            query, key, value = projection(x).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
            scores = query @ key.transpose(-1, -2) / (width // 4) ** 0.5
            scores = scores.masked_fill(~causal[:length, :length], float("-inf"))
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None, :], -1e9)
            x = x + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.head(x)


class StateSpace(nn.Module):
    """Long convolutions by the Fourier transform, in complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, 16) * 0.1) for _ in range(4))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        size = 2 * x.shape[1]
        for kernel, mix in zip(self.kernels, self.mixes, strict=True):
            spectrum = torch.fft.rfft(x.transpose(1, 2), n=size) * torch.fft.rfft(kernel, n=size)
            long = torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]].transpose(1, 2)
            x = x + mix(F.gelu(long))
        return x


class UNet(nn.Module):
    """Down, up, and skips between, with the time of a diffusion step."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24)) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, widths[-1]))
        pairs = list(zip((3, *widths), widths, strict=False))
        self.down = nn.ModuleList(self.block(inputs, outputs) for inputs, outputs in pairs)
        self.middle = self.block(widths[-1], widths[-1])
        self.up = nn.ModuleList(self.block(2 * outputs, max(inputs, 8)) for inputs, outputs in reversed(pairs))
        self.last = nn.Conv2d(8, 3, 1)

    def block(self, inputs: int, outputs: int) -> nn.Sequential:
        """Return two convolutions with normalisation."""
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()),
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        waves = time[:, None].to(x.dtype) * torch.exp(-torch.arange(4, dtype=x.dtype))
        when = self.time(torch.cat([waves.sin(), waves.cos()], -1))
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x) + when[:, :, None, None]
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], 1))
        return self.last(x)


class Autoencoder(nn.Module):
    """A variational autoencoder that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8))
        self.decoder = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, spread = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (spread / 2).exp()
        divergence = -0.5 * (1 + spread - mean.pow(2) - spread.exp()).sum(-1)
        return {"image": self.decoder(code), "divergence": divergence}


class Codebook(nn.Module):
    """Vector quantization: nearest entries, straight through, and a moving average of use in a buffer."""

    use: Tensor

    def __init__(self, entries: int = 8) -> None:
        super().__init__()
        self.entries = nn.Embedding(entries, WIDTH)
        self.register_buffer("use", torch.ones(entries))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.cdist(x, self.entries.weight).argmin(-1)
        found = self.entries(nearest)
        if self.training:
            use: Tensor = self.use  # type: ignore[assignment]
            with torch.no_grad():
                use.mul_(0.9).add_(F.one_hot(nearest, len(use)).sum(0), alpha=0.1)
        commitment = F.mse_loss(found, x.detach()) + 0.25 * F.mse_loss(x, found.detach())
        return x + (found - x).detach(), commitment


class Quantizer(nn.Module):
    """An autoencoder around a codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(mlp(), nn.ReLU(), mlp())
        self.codebook = Codebook()
        self.decoder = nn.Sequential(mlp(), nn.ReLU(), mlp())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, commitment = self.codebook(self.encoder(x))
        return self.decoder(code), commitment


class Flow(nn.Module):
    """Affine couplings with a running log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(nn.Linear(WIDTH // 2, WIDTH) for _ in range(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.size(0))
        for coupling in self.couplings:
            kept, changed = x.split(WIDTH // 2, -1)
            scale, shift = coupling(kept).chunk(2, -1)
            scale = torch.tanh(scale)
            x = torch.cat([changed * scale.exp() + shift, kept], -1)
            total = total + scale.sum(-1)
        return x, total


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


class Wave(nn.Module):
    """Dilated gated convolutions whose skips add up (WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**index) for index in range(5))
        self.skips = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | int = 0
        for index, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            wide = gate(F.pad(x, (2**index, 0)))
            value, opened = wide.chunk(2, 1)
            hidden = torch.tanh(value) * torch.sigmoid(opened)
            total = total + skip(hidden)
            x = x + hidden
        return F.relu(torch.as_tensor(total))


class Patches(nn.Module):
    """A vision transformer that rearranges by einops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 16, WIDTH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        layer = partial(nn.TransformerEncoderLayer, WIDTH, 4, 32, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        from einops import rearrange, reduce, repeat

        x = self.embed(rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4))
        x = torch.cat([repeat(self.token, "1 1 d -> b 1 d", b=image.shape[0]), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(reduce(x, "b n d -> b d", "mean"))


class Passing(nn.Module):
    """Message passing by hand: gather, transform, add up."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for message in self.messages:
            sent = message(torch.cat([x[edges[0]], x[edges[1]]], -1)).relu()
            x = x + torch.zeros_like(x).index_add_(0, edges[1], sent)
        return x


class PerLevel(nn.Module):
    """A feature pyramid: several maps out, joined top down."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in ((3, 8), (8, 16), (16, 32))
        )
        self.sides = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (8, 16, 32))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage, side in zip(self.stages, self.sides, strict=True):
            x = stage(x)
            maps.append(side(x))
        for index in range(len(maps) - 1, 0, -1):
            maps[index - 1] = maps[index - 1] + F.interpolate(maps[index], scale_factor=2)
        return maps


def normalised() -> nn.Module:
    """Return layers whose weights are computed from others."""
    blocks = [parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    return Stack(*blocks, parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), mlp(), nn.Tanh())


def embedded(model: nn.Module) -> Example:
    """Return a model with a batch of vectors."""
    return model, (vectors(),), {}


def recurrent_family() -> Mapping[str, Factory]:
    """Return models with time in them."""
    return {
        "lstm": lambda: (RecurrentModel(nn.LSTM), (words(),), {}),
        "gru": lambda: (RecurrentModel(nn.GRU), (words(),), {}),
        "packed": lambda: (Packed(), (words(), torch.tensor([6, 4, 2])), {}),
        "cell loop": lambda: (CellLoop(), (torch.randn(BATCH, LENGTH, WIDTH),), {}),
        "state space": lambda: (StateSpace(), (torch.randn(BATCH, LENGTH, WIDTH),), {}),
        "wave": lambda: (Wave(), (torch.randn(BATCH, 8, 40),), {}),
        "attention by hand": lambda: (AttentionByHand(), (words(), words() > 3), {}),
    }


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


def container_family() -> Mapping[str, Factory]:
    """Return models that pass structures on."""
    return {
        "dictionaries": lambda: (DictModel(), ({"node": vectors(), "edge": vectors()},), {}),
        "dataclasses": lambda: embedded(PairModel()),
        "list input": lambda: (ListInput(), ([torch.randn(BATCH, width) for width in (4, 8, 12)],), {"scale": 2.0}),
        "list and weights": lambda: (
            ListInput(),
            ([torch.randn(BATCH, width) for width in (4, 8, 12)],),
            {"weight": torch.rand(BATCH, 3)},
        ),
        "pyramid": lambda: (PerLevel(), (torch.randn(2, 3, 32, 32),), {}),
        "messages": lambda: (Passing(), (torch.randn(10, WIDTH), torch.randint(0, 10, (2, 30))), {}),
    }


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


def generative_family() -> Mapping[str, Factory]:
    """Return autoencoders, flows and U-Nets."""
    return {
        "u-net": lambda: (UNet(), (torch.randn(2, 3, 16, 16), torch.tensor([1, 5])), {}),
        "u-net odd": lambda: (UNet((8, 12, 16, 20)), (torch.randn(2, 3, 22, 18), torch.tensor([1, 5])), {}),
        "autoencoder": lambda: (Autoencoder(), (torch.randn(BATCH, 1, 8, 8),), {}),
        "codebook": lambda: embedded(Quantizer()),
        "flow": lambda: embedded(Flow()),
        "einops": lambda: (Patches(), (torch.randn(2, 3, 16, 16),), {}),
    }


HARD: Mapping[str, Callable[[], Mapping[str, Factory]]] = {
    "recurrent": recurrent_family,
    "sharing and freezing": shared_family,
    "memory and dtypes": memory_family,
    "containers": container_family,
    "control flow": control_family,
    "generative": generative_family,
}
"""Families of hard plain models, as in ``tests.real_models.families``."""
