"""The synthetic gradient models of the paper, by the shape of the value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.base import BoundarySpec, GradientEstimator
from dnifx.ir import TensorSpec


@dataclass(frozen=True)
class Synthetic:
    """Predicts the gradient from the value, and from the context where there is one.

    g = W_out f(... f([h, c])) with f = linear, batch norm, ReLU; ``hidden=0`` is the affine map g = W [h, c] + b. The last
    layer starts with zero weights and zero biases, so the first synthetic gradients are exactly 0.

    By the shape of the value: [batch, features] an MLP; [batch, channels, height, width] convolutions that keep the
    resolution, the label as constant channels; [batch, length, features] the MLP on each token. Several values are
    predicted together where they have the same leading shape, each by a network of its own otherwise.

    Args:
        hidden: Number of hidden layers, 0 or more.
        width: Units (or channels) of a hidden layer; by default as many as the value has features.
        batch_norm: Whether hidden layers are normalised (vectors and images; tokens never are).
        kernel: Size of the convolutions' kernels, odd.

    Raises:
        EstimatorError: A value is of a shape or type that none of these models takes.

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
        return SyntheticGradient(groups, [self.network(spec, [spec.values[i] for i in group]) for group in groups])

    def network(self, spec: BoundarySpec, values: Sequence[TensorSpec]) -> nn.Module:
        """Build the network that predicts the gradients of values with one leading shape."""
        sizes = [feature_size(value) for value in values]
        context = spec.context or 0
        if values[0].is_image:
            return ConvolutionalGradient(sizes, context, self.hidden, self.width, self.batch_norm, self.kernel)
        per_token = len(values[0].shape) == 3
        spread = per_token and spec.context_dims == 2
        return DenseGradient(sizes, context, spread, self.hidden, self.width, self.batch_norm and not per_token)


def value_groups(spec: BoundarySpec) -> list[list[int]]:
    """Group the values that one network can predict: the same kind and the same sizes but for the features.

    Raises:
        EstimatorError: Naming the value that no network takes.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, value in enumerate(spec.values):
        if not value.dtype.is_floating_point:
            raise EstimatorError(
                f"boundary {spec.name!r}: value {index} is {value}; a synthetic gradient needs real floating point"
            )
        if len(value.shape) not in (2, 3, 4):
            raise EstimatorError(
                f"boundary {spec.name!r}: value {index} is {value}; Synthetic takes [batch, features], [batch, length, features] "
                "and [batch, channels, height, width]; cut elsewhere, or give a factory (spec -> nn.Module) for this boundary"
            )
        leading = (value.shape[0], *value.shape[2:]) if value.is_image else value.shape[:-1]
        groups.setdefault((len(value.shape), *leading), []).append(index)
    return list(groups.values())


def feature_size(value: TensorSpec) -> int:
    """Return the size of the feature dimension: the channels of an image, else the last one."""
    return value.shape[1] if value.is_image else value.shape[-1]


class SyntheticGradient(GradientEstimator):
    """Runs one network for each group of values."""

    def __init__(self, groups: Sequence[Sequence[int]], networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.groups = [tuple(group) for group in groups]
        self.networks = nn.ModuleList(networks)

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one estimate for each value."""
        answers: dict[int, Tensor] = {}
        for group, network in zip(self.groups, self.networks, strict=True):
            estimates = network([values[index] for index in group], context)
            answers.update(zip(group, estimates, strict=True))
        return tuple(answers[index] for index in range(len(values)))


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """Set a layer's weights and biases to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class DenseGradient(nn.Module):
    """An MLP over the last dimension of vectors or tokens."""

    def __init__(
        self, sizes: Sequence[int], context: int, spread: bool, hidden: int, width: int | None, batch_norm: bool
    ) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.spread = spread
        layers: list[nn.Module] = []
        inputs = sum(sizes) + context
        for _ in range(hidden):
            units = width or sum(sizes)
            layers.append(nn.Linear(inputs, units, bias=not batch_norm))
            layers += [nn.BatchNorm1d(units)] if batch_norm else []
            layers.append(nn.ReLU())
            inputs = units
        layers.append(zeroed(nn.Linear(inputs, sum(sizes))))
        self.layers = nn.Sequential(*layers)

    def forward(self, values: list[Tensor], context: Tensor | None) -> tuple[Tensor, ...]:
        """Predict the gradients of values [batch, (length,) features] together."""
        seen = list(values)
        if context is not None:
            every_token = context.unsqueeze(1).expand(-1, values[0].size(1), -1) if self.spread else context
            seen.append(every_token.to(values[0].dtype))
        answer = self.layers(torch.cat(seen, -1) if len(seen) > 1 else seen[0])
        return (answer,) if len(self.sizes) == 1 else tuple(answer.split(self.sizes, -1))


class ConvolutionalGradient(nn.Module):
    """Convolutions that keep the resolution."""

    def __init__(
        self, sizes: Sequence[int], context: int, hidden: int, width: int | None, batch_norm: bool, kernel: int
    ) -> None:
        super().__init__()
        self.sizes = list(sizes)
        layers: list[nn.Module] = []
        inputs = sum(sizes) + context
        for _ in range(hidden):
            channels = width or sum(sizes)
            layers.append(nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, bias=not batch_norm))
            layers += [nn.BatchNorm2d(channels)] if batch_norm else []
            layers.append(nn.ReLU())
            inputs = channels
        layers.append(zeroed(nn.Conv2d(inputs, sum(sizes), kernel, padding=kernel // 2)))
        self.layers = nn.Sequential(*layers)

    def forward(self, values: list[Tensor], context: Tensor | None) -> tuple[Tensor, ...]:
        """Predict the gradients of values [batch, channels, height, width] together; the context as constant channels."""
        seen = list(values)
        if context is not None:
            height, width = values[0].shape[-2:]
            seen.append(context[:, :, None, None].expand(-1, -1, height, width).to(values[0].dtype))
        answer = self.layers(torch.cat(seen, 1) if len(seen) > 1 else seen[0])
        return (answer,) if len(self.sizes) == 1 else tuple(answer.split(self.sizes, 1))
