"""The default synthetic gradient: an affine map that costs little beside the partition whose gradient it predicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator
from dnifx.estimators.layers import zeroed
from dnifx.estimators.synthetic import feature_size, sees_context, value_groups
from dnifx.ir import TensorSpec
from dnifx.runtime.emitted.gradients import spread_context

fx.wrap("spread_context")


@dataclass(frozen=True)
class Affine:
    """Predicts the gradient by an affine map of the value and the context, in blocks as large as a budget of FLOPs allows.

    g = W h + C y + b, where W is block-diagonal: each block maps some neighbouring features to themselves. All start at zero, so the
    first synthetic gradients are exactly 0. There is no batch norm, so that batches of one example are like any other.

    The features are those of vectors [batch, features] and tokens [batch, ..., features], and the channels of maps
    [batch, channels, height, width, ...]. The map is the same at each position. A number of its own for each example is one
    feature. Values without a batch dimension see no context.

    Args:
        budget: The most FLOPs of W and C together, as a share of those of the partition that makes the values. Where several
            boundaries or values come from one partition, they share it. A label costs none: C is looked up. Blocks of one feature
            cost none that count. Where it is not known what the partition costs, W is one block.

    Raises:
        EstimatorError: ``budget`` is not positive, or a value is not real floating point.

    Example:
        >>> import torch
        >>> from dnifx.estimators import BoundarySpec
        >>> from dnifx.ir import TensorSpec
        >>> value = TensorSpec((2, 8), torch.float32)
        >>> [Affine()(BoundarySpec("layer", (value,), flops=flops)).maps[0].weight.shape for flops in (2048, 512, 0)]
        [torch.Size([1, 8, 8]), torch.Size([2, 4, 4]), torch.Size([8, 1, 1])]

    References:
        Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients", ICML, Section 2.2 and A.1: the affine map is
        the model of the paper's cDNI on MNIST.

    Differs from the paper in: the blocks.
    """

    budget: float = 0.25

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise EstimatorError(f"{self}: the budget must be above 0")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        value_groups(spec)  # refuses what is not real floating point
        elements = max(1, sum(value.elements for value in spec.values))
        maps = []
        for index, value in enumerate(spec.values):
            budget = None if spec.flops is None else self.budget * spec.flops * value.elements / elements
            context = spec.context if sees_context(spec, index) else None
            maps.append(self.single(value, budget, context, spec.classes))
        return AffineGradient(maps)

    def single(self, value: TensorSpec, budget: float | None, context: int | None, classes: int | None) -> "AffineMap":
        """Build the map of one value."""
        features = feature_size(value)
        left = None if budget is None else budget / (2 * max(1, value.elements // max(1, features)))
        told: nn.Module | None = None
        if context is not None and classes is not None:
            told = zeroed(nn.Embedding(classes, features))
        elif context is not None:
            rank = min(context, features)
            if left is not None and context * features > left / 2:
                rank = min(rank, max(1, int(left / 2 // (context + features))))
            told, cost = context_map(context, features, rank)
            left = None if left is None else left - cost
        block = features if left is None else block_within(features, left)
        return AffineMap(features, block, len(value.shape), told)


def context_map(context: int, features: int, rank: int) -> tuple[nn.Module, int]:
    """Return a linear map from context to features that is zero at first, and the multiplications that it needs."""
    if rank == min(context, features):
        return zeroed(nn.Linear(context, features, bias=False)), context * features
    narrow, widen = nn.Linear(context, rank, bias=False), zeroed(nn.Linear(rank, features, bias=False))
    return nn.Sequential(narrow, widen), rank * (context + features)


def block_within(features: int, budget: float) -> int:
    """Return the largest size of equal blocks that together need no more multiplications than a budget; at least 1."""
    even = (-(-features // blocks) for blocks in range(1, features))
    return next((size for size in even if -(-features // size) * size * size <= budget), 1)


class AffineGradient(GradientEstimator):
    """One map for each value."""

    def __init__(self, maps: Sequence["AffineMap"]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value."""
        return tuple(each(value, context) for each, value in zip(self.maps, values, strict=True))


class AffineMap(nn.Module):
    """W h + C y + b for one value, with W in blocks.

    Under Adam a map moves as fast as it has inputs. W is multiplied by the square root of the number of its blocks, so that many
    small blocks learn about as fast as one large block.

    Args:
        features: Size of the feature dimension.
        block: Features of a block.
        dims: Number of dimensions of the value.
        told: From the context to features; None where it sees none.
    """

    def __init__(self, features: int, block: int, dims: int, told: nn.Module | None) -> None:
        super().__init__()
        self.features, self.block, self.dims = features, block, dims
        self.blocks = -(-features // max(1, block))
        self.scale = sqrt(self.blocks)
        self.weight = nn.Parameter(torch.zeros(self.blocks, block, block))
        self.bias = nn.Parameter(torch.zeros(features))
        self.told = told

    def forward(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Return the gradient of a value, in its shape."""
        weight = self.weight * self.scale
        told = None if context is None or self.told is None else self.seen(self.told, context)
        if self.dims in CONVOLUTIONS:
            answer = self.of_channels(value, weight)
            return answer if told is None else answer + spread_context(told, answer.movedim(1, -1)).movedim(-1, 1)
        last = value.unsqueeze(-1) if self.dims < 2 else value.movedim(1, -1) if self.dims >= 4 else value
        answer = self.of_features(last, weight)
        answer = answer if told is None else answer + spread_context(told, answer)
        return answer.squeeze(-1) if self.dims < 2 else answer.movedim(-1, 1) if self.dims >= 4 else answer

    @staticmethod
    def seen(told: nn.Module, context: Tensor) -> Tensor:
        """Return C y, [batch, features]."""
        answer: Tensor = told(context.argmax(-1)) if isinstance(told, nn.Embedding) else told(context)
        return answer

    def of_channels(self, value: Tensor, weight: Tensor) -> Tensor:
        """Return W h + b of maps [batch, channels, height, width] or of volumes, in their memory as it is."""
        ones = (1,) * (self.dims - 2)
        if self.block == 1:
            return value * weight.view(-1, *ones) + self.bias.view(-1, *ones)
        more = self.blocks * self.block - self.features
        padded = functional.pad(value, (*(0, 0) * (self.dims - 2), 0, more)) if more else value
        bias = functional.pad(self.bias, (0, more)) if more else self.bias
        kernel = weight.flatten(0, 1).view(-1, self.block, *ones)
        answer: Tensor = CONVOLUTIONS[self.dims](padded, kernel, bias, groups=self.blocks)
        return answer.narrow(1, 0, self.features) if more else answer

    def of_features(self, value: Tensor, weight: Tensor) -> Tensor:
        """Return W h + b of values [..., features]."""
        if self.block == 1:
            return value * weight.flatten() + self.bias
        if self.blocks == 1:
            return functional.linear(value, weight.squeeze(0), self.bias)
        more = self.blocks * self.block - self.features
        padded = functional.pad(value, (0, more)) if more else value
        apart = padded.unflatten(-1, (self.blocks, self.block))  # type: ignore[no-untyped-call]
        answer = torch.einsum("...gi,goi->...go", apart, weight).flatten(-2)
        return (answer.narrow(-1, 0, self.features) if more else answer) + self.bias


CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {4: functional.conv2d, 5: functional.conv3d}
"""By the number of dimensions of a value, the convolution over its positions."""
