"""A small vision transformer."""

import torch
from torch import Tensor, nn

from dnifx.errors import OptionError
from dnifx.zoo.transformer import Block


class ViT(nn.Module):
    """A classifier that reads an image as a row of patches.

    h_0 = patches(x) + p,  h_i = block_i(h_{i-1}),  output = W mean(norm(h_n)) + b

    The modules are ``patches``, ``blocks.0``, ``blocks.1``, ..., ``norm`` and ``classifier``.

    Args:
        image: Shape of an input image, [channels, height, width].
        classes: Number of classes.
        layers: Blocks.
        width: Features of a token.
        heads: Heads of an attention.
        patch: Pixels of a side of a patch; it divides height and width.

    Raises:
        OptionError: The patch does not divide the image, or the heads do not divide the width.

    >>> ViT(layers=1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    References:
        Dosovitskiy et al. 2021, "An image is worth 16x16 words", ICLR.

    Differs from the paper in: the mean over tokens in place of a class token.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        layers: int = 6,
        width: int = 64,
        heads: int = 4,
        patch: int = 4,
    ) -> None:
        super().__init__()
        channels, height, across = image
        if height % patch or across % patch:
            raise OptionError(f"ViT(): got {patch=}, expected a number that divides the image, {height} x {across}")
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, height * across // patch**2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, classes] of the images ``x`` [batch, channels, height, width]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens)).mean(1))
        return logits
