"""A small causal language model."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dnifx.zoo.transformer import Block


class LanguageModel(nn.Module):
    """Predicts each next symbol of a text from those before it.

    h_0 = E x + p,  h_i = block_i(h_{i-1}),  output = W norm(h_n)

    The modules are ``embedding``, ``blocks.0``, ``blocks.1``, ..., ``norm`` and, unless it is tied,
    ``readout``.

    Args:
        symbols: Number of characters or words.
        layers: Blocks.
        width: Features of a symbol.
        heads: Heads of an attention.
        length: Symbols of a window at most.
        tied: Whether W is E. The embedding has then its usual small weights in both places.

    >>> LanguageModel(symbols=5, layers=1)(torch.zeros(2, 8, dtype=torch.int64)).shape
    torch.Size([2, 8, 5])

    References:
        Radford et al. 2019, "Language models are unsupervised multitask learners". Press, Wolf 2017,
        "Using the output embedding to improve language models": tied embeddings.
    """

    def __init__(
        self, symbols: int, layers: int = 4, width: int = 64, heads: int = 4, length: int = 64, tied: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.readout = None if tied else nn.Linear(width, symbols, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, length, symbols] of the symbols ``x`` [batch, length], int64."""
        tokens = self.embedding(x) + self.position[: x.size(1)]
        hidden = self.norm(self.blocks(tokens))
        if self.readout is None:
            return functional.linear(hidden, self.embedding.weight)
        logits: Tensor = self.readout(hidden)
        return logits
