"""The block of a transformer, for images and for text."""

from torch import Tensor, nn
from torch.nn import functional

from dnifx.errors import OptionError


class Block(nn.Module):
    """Attention and an MLP, each with a layer norm before it and a shortcut around it.

    h = x + attention(norm(x)),  output = h + W_2 GELU(W_1 norm(h))

    Args:
        width: Features of a token.
        heads: Heads of the attention; they divide the width.
        causal: Whether a token sees only itself and those before it.

    Raises:
        OptionError: The heads do not divide the width.

    References:
        Vaswani et al. 2017, "Attention is all you need"; with the norms where Radford et al. 2019 have them.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise OptionError(f"Block(): got {heads=}, expected a number that divides {width=}")
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for tokens [batch, length, width]."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def attention(self, x: Tensor) -> Tensor:
        """Return what each token takes from the tokens that it sees."""
        split = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        taken = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        joined: Tensor = self.join(taken.transpose(1, 2).flatten(2))
        return joined
