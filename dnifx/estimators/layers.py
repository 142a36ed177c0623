"""The layers that estimators are made of."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn


def hidden_layers(
    layer: Callable[..., nn.Module], sizes: Sequence[int], norm: type[nn.Module] | None
) -> list[nn.Module]:
    """Return the layers from each size to the next: linear or convolutional, then ``norm`` if given, then ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [layer(inputs, outputs, bias=norm is None), *([] if norm is None else [norm(outputs)]), nn.ReLU()]
    return layers


def network(
    layer: Callable[..., nn.Module], inputs: int, outputs: int, hidden: int, width: int, norm: type[nn.Module] | None
) -> nn.Sequential:
    """Return ``hidden`` hidden layers of ``width`` units and a last layer that is zero at first."""
    sizes = [inputs, *[width] * hidden]
    return nn.Sequential(*hidden_layers(layer, sizes, norm), zeroed(layer(sizes[-1], outputs)))


def convolution(kernel: int) -> Callable[..., nn.Module]:
    """Return what makes convolutions that keep the resolution; the kernel's size is odd."""
    return partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set a layer's weights and biases to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def planes(context: Tensor, image: Tensor) -> Tensor:
    """Return context features [batch, width] as constant channels of the size and dtype of an image."""
    height, width = image.shape[-2:]
    return context[:, :, None, None].expand(-1, -1, height, width).to(image.dtype)


def parted(answer: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """Split an answer into the parts of its values. Each is a slice, so that torch.fx can trace it."""
    if len(sizes) == 1:
        return (answer,)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(answer.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))
