"""The synthetic gradient models of the paper, chosen by the shape of the value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator
from dnifx.estimators.layers import convolution, network, parted, planes
from dnifx.ir import TensorSpec
from dnifx.runtime.emitted.gradients import spread_context, through

fx.wrap("spread_context")
fx.wrap("through")


@dataclass(frozen=True)
class Synthetic:
    """Predicts the gradient from the value, and from the context if there is one.

    g = W_out f(... f([h, c])) with f = linear, batch norm, ReLU; ``hidden=0`` is the affine map g = W [h, c] + b. The last
    layer starts with zero weights and zero biases, so the first synthetic gradients are exactly 0.

    The shape of the value decides the model:

    - [batch, features]: an MLP.
    - [batch, channels, height, width]: convolutions that keep the resolution, with the label as constant channels.
    - [batch, length, features]: the MLP, on each token.
    - More dimensions: the MLP, on the channels at each position.
    - One number for each example, or a single number: the MLP, on that number.

    Values with the same leading shape are predicted together, others each by a network of its own. Values without a
    batch dimension (such as a bias that blocks share) see no context.

    A batch of one example is normalised by the running averages, which it does not move; nor does a batch that is not finite.

    Args:
        hidden: Number of hidden layers, 0 or more.
        width: Units (or channels) of a hidden layer; by default as many as the value has features.
        batch_norm: Whether hidden layers are normalised. This applies to vectors and images; tokens never are.
        kernel: Size of the convolution kernels, odd. It shrinks to fit maps that are smaller.

    Raises:
        EstimatorError: An option is out of its range, or a value is not real floating point.

    References:
        Jaderberg et al. 2017, Sections 2.2 and A.1: MLPs for fully connected nets, 5x5 convolutions without pooling for
        convolutional ones, labels as a one-hot vector or as ten constant channels.
    """

    hidden: int = 1
    width: int | None = None
    batch_norm: bool = True
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.hidden < 0 or (self.width is not None and self.width < 1) or self.kernel < 1 or self.kernel % 2 == 0:
            raise EstimatorError(f"{self}: hidden must be 0 or more, width positive and kernel odd")

    def __call__(self, spec: BoundarySpec) -> nn.Module:
        """Build the estimator of one boundary."""
        groups = value_groups(spec)
        return SyntheticGradient(groups, [self.network(spec, group) for group in groups])

    def network(self, spec: BoundarySpec, group: Sequence[int]) -> nn.Module:
        """Build the network that predicts the gradients of values with one leading shape.

        Where the data decide how many rows there are, there may be none or one: it has no batch norm there.
        """
        values, routed = [spec.values[index] for index in group], bool(spec.routed.intersection(group))
        sizes = [feature_size(value) for value in values]
        shape = values[0].shape
        context = (spec.context or 0) if sees_context(spec, group[0]) else 0
        ends = sum(sizes) + context, sum(sizes), self.hidden, self.width or sum(sizes)
        norm = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}.get(len(shape)) if self.batch_norm and not routed else None
        if len(shape) == 4:
            kernel = min(self.kernel, min(shape[2:]) - (min(shape[2:]) + 1) % 2) if min(shape[2:]) else 1
            return GroupGradient(sizes, context, len(shape), network(convolution(kernel), *ends, norm))
        return GroupGradient(sizes, context, len(shape), network(nn.Linear, *ends, norm))


def value_groups(spec: BoundarySpec) -> list[list[int]]:
    """Group the values that one network can predict: they have equal shapes, except for the number of features.

    A value whose first size the data decide is alone: another's may be another one in the next call.

    Raises:
        EstimatorError: Naming the value that no network takes.
    """
    groups: dict[tuple[int | None, ...], list[int]] = {}
    for index, value in enumerate(spec.values):
        if not value.dtype.is_floating_point:
            name = spec.names[index] if spec.names else f"value {index}"
            raise EstimatorError(
                f"boundary {spec.name!r}: {name} is {value}; a synthetic gradient needs real floating point; cut elsewhere, "
                "or give a factory (spec -> nn.Module) for this boundary"
            )
        channels_first = len(value.shape) >= 4
        leading = (value.shape[0], *value.shape[2:]) if channels_first else value.shape[:-1]
        groups.setdefault((index if index in spec.routed else None, len(value.shape), *leading), []).append(index)
    return list(groups.values())


def sees_context(spec: BoundarySpec, index: int) -> bool:
    """Whether the context belongs to a value: its rows are examples."""
    shape = spec.values[index].shape
    return bool(shape) and index not in spec.routed and (spec.batch is None or shape[0] == spec.batch)


def feature_size(value: TensorSpec) -> int:
    """Return the size of the feature dimension: the channels of a map, else the last one; 1 for single numbers."""
    if len(value.shape) < 2:
        return 1
    return value.shape[1] if len(value.shape) >= 4 else value.shape[-1]


class SyntheticGradient(GradientEstimator):
    """Runs one network for each group of values."""

    def __init__(self, groups: Sequence[Sequence[int]], networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.groups = [tuple(group) for group in groups]
        self.networks = nn.ModuleList(networks)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value."""
        answers: dict[int, Tensor] = {}
        for group, each in zip(self.groups, self.networks, strict=True):
            estimates = each([values[index] for index in group], context)
            answers.update(zip(group, estimates, strict=True))
        return tuple(answers[index] for index in range(len(values)))


class GroupGradient(nn.Module):
    """Predicts the gradients of values with one leading shape together.

    It is convolutions over images, which see the context as constant channels, or an MLP over the features of vectors,
    tokens or positions.
    """

    def __init__(self, sizes: Sequence[int], context: int, dimensions: int, layers: nn.Sequential) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.dimensions = dimensions
        self.sees_context = context > 0
        self.layers = layers

    def forward(self, values: list[Tensor], context: Tensor | None) -> tuple[Tensor, ...]:
        """Return one gradient for each value."""
        features, spread = (1, planes) if self.dimensions == 4 else (-1, spread_context)
        seen = [self.features_last(value) for value in values]
        if context is not None and self.sees_context:
            seen.append(spread(context, seen[0]))
        answer = through(self.layers, torch.cat(seen, features) if len(seen) > 1 else seen[0])
        return tuple(self.back(part) for part in parted(answer, self.sizes, features))

    def features_last(self, value: Tensor) -> Tensor:
        """Return a value as [..., features]; an image stays as it is."""
        if self.dimensions < 2:
            return value.unsqueeze(-1)
        return value.movedim(1, -1) if self.dimensions > 4 else value

    def back(self, answer: Tensor) -> Tensor:
        """Return a part of the answer in the value's own layout."""
        if self.dimensions < 2:
            return answer.squeeze(-1)
        return answer.movedim(-1, 1) if self.dimensions > 4 else answer
