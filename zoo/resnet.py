"""A residual network for small images."""

from collections import OrderedDict

from torch import Tensor, nn

from dnifx.errors import OptionError


class ResNet(nn.Module):
    """A residual classifier of three stages.

    h_0 = ReLU(BN(W * x)),  h_i = ReLU(f_i(h_{i-1}) + s_i(h_{i-1})),  output = W mean(h_n) + b

    f_i has two 3x3 convolutions, each with batch norm, and a ReLU between them. s_i is the identity;
    where the size changes it is a 1x1 convolution with batch norm. The first block of the second and
    third stage halves the image and doubles the filters. The modules are ``stem``, ``stages.0.0``,
    ``stages.0.1``, ... and ``classifier``. The cuts ``"stages.0,stages.1"`` put an interface between
    stages, ``"stages.*.*"`` one after every block.

    Args:
        image: Shape of an input image, [channels, height, width].
        classes: Number of classes.
        blocks: Residual blocks of a stage, 1 or more. 3 gives 20 layers.
        filters: Filters of the first stage.

    Raises:
        OptionError: ``blocks`` is below 1.

    >>> import torch
    >>> ResNet(blocks=1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    References:
        He, Zhang, Ren, Sun 2016, "Deep residual learning for image recognition", CVPR, section 4.2.

    Differs from the paper in: the projection in s_i; the paper pads with zeros on CIFAR-10.
    """

    def __init__(
        self, image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, blocks: int = 3, filters: int = 16
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise OptionError(f"ResNet(): got {blocks=}, expected 1 or more in each of the three stages")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = nn.Conv2d(image[0], filters, kernel_size=3, padding=1, bias=False)
        layers["norm"], layers["activation"] = nn.BatchNorm2d(filters), nn.ReLU()
        self.stem = nn.Sequential(layers)
        widths = (filters, 2 * filters, 4 * filters)
        self.stages = nn.Sequential(
            *(_stage(before, width, blocks) for before, width in zip((filters, *widths), widths, strict=False))
        )
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, classes] of the images ``x`` [batch, channels, height, width]."""
        logits: Tensor = self.classifier(self.flatten(self.pool(self.stages(self.stem(x)))))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut around them.

    Args:
        inputs: Filters of the input.
        filters: Filters of the output.
        stride: 2 halves the image.
    """

    def __init__(self, inputs: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.activation = nn.ReLU()
        project = nn.Conv2d(inputs, filters, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(filters)
        self.shortcut = nn.Identity() if stride == 1 and inputs == filters else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for images [batch, inputs, height, width]."""
        inner = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        out: Tensor = self.activation(inner + self.shortcut(x))
        return out


def _stage(inputs: int, filters: int, blocks: int) -> nn.Sequential:
    first = ResidualBlock(inputs, filters, 1 if inputs == filters else 2)
    return nn.Sequential(first, *(ResidualBlock(filters, filters) for _ in range(blocks - 1)))
