"""Synthetic input models: they predict what a partition takes, so that it need not wait for those before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dnifx.errors import EstimatorError
from dnifx.estimators.layers import convolution, hidden_layers, planes
from dnifx.ir import TensorSpec
from dnifx.runtime.emitted.gradients import through

fx.wrap("through")


@dataclass(frozen=True)
class InputSpec:
    """What an input model is built from.

    Attributes:
        name: The boundary's name, for error texts.
        inputs: Specs of the model's own inputs, batch dimension first. They are all that the input model sees.
        values: Specs of the boundary's values, which it predicts.
        context: Width of the context features, or None if there is no context.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    values: tuple[TensorSpec, ...]
    context: int | None = None


@dataclass(frozen=True)
class SyntheticInput:
    """Predicts a boundary's values from the data alone: h = I(x), fitted to the true values by least squares.

    If the input and all values are images [batch, channels, height, width], it is convolutions at the input's
    resolution, then an average down to the value's resolution, then another convolution. Otherwise it is an MLP over
    the flattened inputs.

    Args:
        hidden: Number of hidden layers.
        width: Units or channels of a hidden layer; by default as many as the value has.
        batch_norm: Whether hidden layers are normalised.
        kernel: Size of the convolutions' kernels, odd.

    Raises:
        EstimatorError: An input or a value is not a floating-point tensor [batch, ...].

    References:
        Jaderberg et al. 2017, Section 2.2 and Figure 6 (complete unlock): one hidden layer, which takes the data at every
        depth.
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
                    f"boundary {spec.name!r}: SyntheticInput takes floating-point tensors [batch, ...], got {tensor}; "
                    "give a factory (spec -> nn.Module) as inputs= for this boundary"
                )
        images = len(spec.inputs) == 1 and spec.inputs[0].is_image and all(value.is_image for value in spec.values)
        build = self.convolutional if images else self.dense
        return PredictedValues([build(spec, value) for value in spec.values])

    def dense(self, spec: InputSpec, value: TensorSpec) -> nn.Module:
        """Build an MLP from the flattened inputs to one value."""
        size = value.elements_per_example
        inputs = sum(tensor.elements_per_example for tensor in spec.inputs) + (spec.context or 0)
        sizes = [inputs, *[self.width or size] * self.hidden]
        layers = hidden_layers(nn.Linear, sizes, nn.BatchNorm1d if self.batch_norm else None)
        return DenseInput(nn.Sequential(*layers, nn.Linear(sizes[-1], size)), value.shape[1:])

    def convolutional(self, spec: InputSpec, value: TensorSpec) -> nn.Module:
        """Build convolutions from an image to one value."""
        sizes = [spec.inputs[0].shape[1] + (spec.context or 0), *[self.width or value.shape[1]] * self.hidden]
        layer = convolution(self.kernel)
        layers = hidden_layers(layer, sizes, nn.BatchNorm2d if self.batch_norm else None)
        last = layer(sizes[-1], value.shape[1])
        return ConvolutionalInput(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(value.shape[2:]), last))


class PredictedValues(nn.Module):
    """One network for each value."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return one prediction for each value, from the model's inputs [batch, ...] and the context [batch, width]."""
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
        answer = through(self.layers, torch.cat(seen, 1) if len(seen) > 1 else seen[0])
        return answer.reshape(-1, *self.shape)


class ConvolutionalInput(nn.Module):
    """Convolutions over the image; the context is constant channels."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: tuple[Tensor, ...], context: Tensor | None) -> Tensor:
        """Predict one value, [batch, channels, height, width]."""
        seen = inputs[0] if context is None else torch.cat([inputs[0], planes(context, inputs[0])], 1)
        return through(self.layers, seen)
