"""Autoencoders, flows, U-Nets, and patches of images."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_models.hard.pieces import BATCH, WIDTH, Factory, embedded, mlp


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
