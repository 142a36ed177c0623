"""Synthetic input models: what a partition runs on when it does not wait for the ones before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnifx.errors import EstimatorError
from dnifx.ir import TensorSpec


@dataclass(frozen=True)
class InputSpec:
    """What an input model is built from.

    Attributes:
        name: The boundary's name, for error texts.
        inputs: Specs of the model's own inputs, batch dimension first; the input model sees these alone.
        values: Specs of the boundary's values, which it predicts.
        context: Width of the context features, or None where there is no context.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    values: tuple[TensorSpec, ...]
    context: int | None = None


@dataclass(frozen=True)
class SyntheticInput:
    """Predicts a boundary's values from the data alone: h = I(x), fitted to the true values by least squares.

    An MLP over the flattened inputs for values [batch, features]; for values [batch, channels, height, width] of an image
    input, a convolution at the input's resolution, averaged down to the value's, and another convolution.

    Args:
        hidden: Number of hidden layers.
        width: Units or channels of a hidden layer; by default as many as the value has.
        batch_norm: Whether hidden layers are normalised.
        kernel: Size of the convolutions' kernels, odd.

    Raises:
        EstimatorError: An input or a value is of a shape or type that neither takes.

    References:
        Jaderberg et al. 2017, Section 2.2 and Figure 6 (complete unlock): one hidden layer, fed by the data at every depth.
    """

    hidden: int = 1
    width: int | None = None
    batch_norm: bool = True
    kernel: int = 5

    def __call__(self, spec: InputSpec) -> nn.Module:
        """Build the input model of one boundary."""
        for tensor in (*spec.inputs, *spec.values):
            if not tensor.dtype.is_floating_point or len(tensor.shape) < 2:
                raise EstimatorError(
                    f"boundary {spec.name!r}: SyntheticInput takes floating-point tensors [batch, ...], got {tensor}; give a factory "
                    "(spec -> nn.Module) as inputs= for this boundary"
                )
        images = len(spec.inputs) == 1 and spec.inputs[0].is_image and all(value.is_image for value in spec.values)
        build = self.convolutional if images else self.dense
        return ImaginedValues([build(spec, value) for value in spec.values])

    def dense(self, spec: InputSpec, value: TensorSpec) -> nn.Module:
        """Build an MLP from the flattened inputs to one value."""
        size = torch.Size(value.shape[1:]).numel()
        inputs = sum(torch.Size(tensor.shape[1:]).numel() for tensor in spec.inputs) + (spec.context or 0)
        layers: list[nn.Module] = []
        for _ in range(self.hidden):
            units = self.width or size
            layers.append(nn.Linear(inputs, units, bias=not self.batch_norm))
            layers += [nn.BatchNorm1d(units)] if self.batch_norm else []
            layers.append(nn.ReLU())
            inputs = units
        return DenseInput(nn.Sequential(*layers, nn.Linear(inputs, size)), value.shape[1:])

    def convolutional(self, spec: InputSpec, value: TensorSpec) -> nn.Module:
        """Build convolutions from an image to one value."""
        channels = spec.inputs[0].shape[1] + (spec.context or 0)
        layers: list[nn.Module] = []
        for _ in range(self.hidden):
            units = self.width or value.shape[1]
            layers.append(nn.Conv2d(channels, units, self.kernel, padding=self.kernel // 2, bias=not self.batch_norm))
            layers += [nn.BatchNorm2d(units)] if self.batch_norm else []
            layers.append(nn.ReLU())
            channels = units
        last = nn.Conv2d(channels, value.shape[1], self.kernel, padding=self.kernel // 2)
        return ConvolutionalInput(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(value.shape[2:]), last))


class ImaginedValues(nn.Module):
    """One network a value."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one prediction for each value.

        Args:
            inputs: The model's inputs, [batch, ...] each.
            context: Context features [batch, width], where there is a context.
        """
        return tuple(network(inputs, context) for network in self.networks)


class DenseInput(nn.Module):
    """An MLP over everything it sees."""

    def __init__(self, layers: nn.Sequential, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers
        self.shape = shape

    def forward(self, inputs: tuple[Tensor, ...], context: Tensor | None) -> Tensor:
        """Predict one value, [batch, ...]."""
        seen = [tensor.flatten(1) for tensor in inputs]
        if context is not None:
            seen.append(context.flatten(1).to(seen[0].dtype))
        answer: Tensor = self.layers(torch.cat(seen, 1) if len(seen) > 1 else seen[0])
        return answer.reshape(-1, *self.shape)


class ConvolutionalInput(nn.Module):
    """Convolutions over the image, the context as constant channels."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: tuple[Tensor, ...], context: Tensor | None) -> Tensor:
        """Predict one value, [batch, channels, height, width]."""
        seen = inputs[0]
        if context is not None:
            planes = context[:, :, None, None].expand(-1, -1, seen.size(2), seen.size(3))
            seen = torch.cat([seen, planes.to(seen.dtype)], 1)
        answer: Tensor = self.layers(seen)
        return answer
