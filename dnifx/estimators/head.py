"""Auxiliary heads: small classifiers over the values of a boundary."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, need_features
from dnifx.estimators.layers import network
from dnifx.runtime.emitted.gradients import by_position, head_input, through

fx.wrap("by_position")
fx.wrap("head_input")
fx.wrap("through")


@dataclass(frozen=True)
class Head:
    """Classifies the values of a boundary by an MLP over all their features at once.

    Vectors [batch, features] are taken as they are. Tokens [batch, length, features] are averaged over those that count; where
    each token has a label, each is classified by itself. Images are averaged down to ``pool`` x ``pool``. The last layer
    starts at zero, so all classes are equally likely, and the first gradients with respect to the values are exactly 0.

    Args:
        hidden: Number of hidden layers (linear, batch norm, ReLU).
        width: Units of a hidden layer; by default as many as there are features after pooling.
        pool: Height and width that images are averaged down to; None classifies each pixel by itself.

    Raises:
        EstimatorError: There is no label context, a value has a shape that no head takes, or an option is out of range.
    """

    hidden: int = 0
    width: int | None = None
    pool: int | None = 2

    def __post_init__(self) -> None:
        sizes = (self.pool, self.width)
        if self.hidden < 0 or any(size is not None and size < 1 for size in sizes):
            raise EstimatorError(f"{self}: hidden must be 0 or more, width and pool positive")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the head of one boundary: from its values to logits [batch, classes]."""
        if spec.classes is None:
            raise EstimatorError(
                f"boundary {spec.name!r}: a head classifies, so it needs labels; give dnifx.decouple(..., context='label', "
                "num_classes=...), or a head of your own"
            )
        need_features("a head", spec, "cut elsewhere, or give head= a factory (spec -> nn.Module)")
        sizes = (each.shape[1] * (self.pool or 1) ** 2 if each.is_image else each.shape[-1] for each in spec.values)
        inputs = sum(sizes)
        layers = network(nn.Linear, inputs, spec.classes, self.hidden, self.width or inputs, nn.BatchNorm1d)
        return PooledHead(layers, [len(value.shape) for value in spec.values], self.pool)


class PooledHead(nn.Module):
    """Pools each value to a vector, and classifies all of them together; where positions have labels, each position."""

    def __init__(self, layers: nn.Sequential, dims: list[int], pool: int | None) -> None:
        super().__init__()
        self.layers = layers
        self.dims = dims
        self.pool = None if pool is None else nn.AdaptiveAvgPool2d(pool)

    def forward(self, values: tuple[Tensor, ...], mask: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """Return logits [batch, classes], or [batch, ..., classes] for one answer a token or pixel.

        Args:
            values: The boundary's values.
            mask: Which tokens count, [batch, length].
            label: One-hot labels, [batch, classes], or [batch, length, classes] where each token has one.
        """
        seen = [self.pooled(value, dims, mask, label) for value, dims in zip(values, self.dims, strict=True)]
        rows = torch.cat(seen, -1) if len(seen) > 1 else seen[0]
        logits = through(self.layers, rows.flatten(0, -2))
        return by_position(logits, rows)

    def pooled(self, value: Tensor, dims: int, mask: Tensor | None, label: Tensor | None) -> Tensor:
        """Return a value as one vector for each example, or for each position that is classified by itself."""
        if dims == 4 and self.pool is None:
            return value.movedim(1, -1)
        if dims == 4 and self.pool is not None:
            flat: Tensor = self.pool(value).flatten(1)
            return flat
        return head_input(value, label, mask) if dims == 3 else value
