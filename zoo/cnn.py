"""The paper's convolutional network."""

from collections import OrderedDict

from torch import Tensor, nn

from dnifx.errors import OptionError


class CNN(nn.Module):
    """A convolutional classifier.

    A hidden layer has a convolution, batch norm, ReLU and a pool. The last layer is linear.

    h_0 = x,  h_i = pool_i(ReLU(BN(W_i * h_{i-1} + b_i))) for i = 1 .. layers - 1
    output = W flatten(h_{layers-1}) + b

    The 5x5 convolutions keep the size. The pools cover 3x3; pool_1 takes the maximum, the others
    the average. The layers are the modules ``hidden.0``, ``hidden.1``, ... and ``classifier``. The
    cuts ``"hidden.*"`` put an interface after every hidden layer.

    Args:
        image: Shape of an input image, [channels, height, width]; any size from 1 x 1.
        classes: Number of classes.
        layers: Number of layers, including the classifier, 2 or more.
        filters: Filters of a hidden layer: 64 for MNIST, 128 for CIFAR-10.

    Raises:
        OptionError: ``layers`` is below 2.

    >>> import torch
    >>> CNN(layers=3)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])

    References:
        Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017,
        arXiv 1608.05343v1, appendix A.1.

    Differs from the paper in: the pools' stride and padding, which the paper does not state. Here
    they are 2 and 1. Each layer halves the image (28, 14, 7, 4, 2, 1, 1, ...), so any depth fits
    any image. A stride of 3, as in Belilovsky et al. 2020, ends at the third layer. The average
    leaves the padding out. The paper does not say whether its "3 layers" count the classifier. Here
    they do, as in its fully connected network.
    """

    def __init__(
        self, image: tuple[int, int, int] = (1, 28, 28), classes: int = 10, layers: int = 4, filters: int = 64
    ) -> None:
        super().__init__()
        if layers < 2:
            raise OptionError(f"CNN(): got {layers=}, expected 2 or more: a hidden layer and the classifier")
        channels, height, width = image
        inputs = [channels, *[filters] * (layers - 2)]
        self.hidden = nn.Sequential(*(_hidden(size, filters, first=not i) for i, size in enumerate(inputs)))
        for _ in inputs:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(filters * height * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, classes] of the images ``x`` [batch, channels, height, width]."""
        logits: Tensor = self.classifier(self.flatten(self.hidden(x)))
        return logits


def _hidden(channels: int, filters: int, *, first: bool) -> nn.Sequential:
    layer: OrderedDict[str, nn.Module] = OrderedDict()
    layer["conv"] = nn.Conv2d(channels, filters, kernel_size=5, padding=2)
    layer["norm"] = nn.BatchNorm2d(filters)
    layer["activation"] = nn.ReLU()
    layer["pool"] = (
        nn.MaxPool2d(3, stride=2, padding=1) if first else nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
    )
    return nn.Sequential(layer)
