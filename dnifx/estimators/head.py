"""Auxiliary heads: small classifiers over the values of a boundary."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec
from dnifx.ir import TensorSpec
from dnifx.runtime.emitted.interface import token_mean

fx.wrap("token_mean")


@dataclass(frozen=True)
class Head:
    """Classifies the values of a boundary: images are averaged down, then an MLP over all features at once.

    Vectors [batch, features] are taken as they are, tokens [batch, length, features] averaged over those that count, images
    averaged down to ``pool`` x ``pool``. The last layer starts at zero, so that all classes are as likely and the first
    gradients with respect to the values are exactly 0.

    Args:
        hidden: Number of hidden layers (linear, batch norm, ReLU).
        width: Units of a hidden layer; by default as many as there are features after pooling.
        pool: Height and width that images are averaged down to.

    Raises:
        EstimatorError: There is no label context, or a value has a shape that no head takes.
    """

    hidden: int = 0
    width: int | None = None
    pool: int = 2

    def __post_init__(self) -> None:
        if self.hidden < 0 or self.pool < 1 or (self.width is not None and self.width < 1):
            raise EstimatorError(f"{self}: hidden must be 0 or more, width and pool positive")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the head of one boundary: from its values to logits [batch, classes]."""
        if spec.classes is None:
            raise EstimatorError(
                f"boundary {spec.name!r}: a head classifies, so it needs labels; give dnifx.decouple(..., context='label', "
                "num_classes=...), or a head of your own"
            )
        features = sum(self.features(spec, value) for value in spec.values)
        layers: list[nn.Module] = []
        for _ in range(self.hidden):
            units = self.width or features
            layers += [nn.Linear(features, units, bias=False), nn.BatchNorm1d(units), nn.ReLU()]
            features = units
        last = nn.Linear(features, spec.classes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return PooledHead(nn.Sequential(*layers, last), [len(value.shape) for value in spec.values], self.pool)

    def features(self, spec: BoundarySpec, value: TensorSpec) -> int:
        """Return the number of features that a value has after pooling."""
        if len(value.shape) not in (2, 3, 4) or not value.dtype.is_floating_point:
            raise EstimatorError(
                f"boundary {spec.name!r}: a head takes floating-point values [batch, features], [batch, length, features] and "
                f"[batch, channels, height, width], got {value}; cut elsewhere, or give head= a factory (spec -> nn.Module)"
            )
        return value.shape[1] * self.pool**2 if value.is_image else value.shape[-1]


class PooledHead(nn.Module):
    """Pools every value to a vector, and classifies them together."""

    def __init__(self, layers: nn.Sequential, dims: list[int], pool: int) -> None:
        super().__init__()
        self.layers = layers
        self.dims = dims
        self.pool = nn.AdaptiveAvgPool2d(pool)

    def forward(self, values: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
        """Return logits, [batch, classes]; tokens that the mask [batch, length] leaves out do not count."""
        seen = [self.pooled(value, dims, mask) for value, dims in zip(values, self.dims, strict=True)]
        logits: Tensor = self.layers(torch.cat(seen, 1) if len(seen) > 1 else seen[0])
        return logits

    def pooled(self, value: Tensor, dims: int, mask: Tensor | None) -> Tensor:
        """Return a value as a vector an example."""
        if dims == 4:
            flat: Tensor = self.pool(value).flatten(1)
            return flat
        return token_mean(value, mask) if dims == 3 else value
