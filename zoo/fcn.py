"""The paper's fully connected network."""

from collections import OrderedDict

from torch import Tensor, nn

from dnifx.errors import OptionError


class FCN(nn.Module):
    """A fully connected classifier.

    A hidden layer has a linear map, batch norm and ReLU. The last layer is linear.

    h_0 = x,  h_i = ReLU(BN(W_i h_{i-1} + b_i)) for i = 1 .. layers - 1
    output = W h_{layers-1} + b

    The layers are the modules ``hidden.0``, ``hidden.1``, ... and ``classifier``. The cuts
    ``"hidden.*"`` put an interface after every hidden layer, as in the paper: a network of 4 layers
    has 3 interfaces.

    Args:
        inputs: Size of an input vector, 784 for MNIST.
        classes: Number of classes.
        layers: Number of layers, including the classifier, 2 or more.
        width: Units of a hidden layer: 256 for MNIST, 1000 for CIFAR-10.

    Raises:
        OptionError: ``layers`` is below 2.

    >>> import torch
    >>> FCN(layers=4)(torch.zeros(2, 784)).shape
    torch.Size([2, 10])

    References:
        Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017,
        arXiv 1608.05343v1, appendix A.1.

    Differs from the paper in: the initial weights, which the paper does not state. They are
    PyTorch's.
    """

    def __init__(self, inputs: int = 784, classes: int = 10, layers: int = 4, width: int = 256) -> None:
        super().__init__()
        if layers < 2:
            raise OptionError(f"FCN(): got {layers=}, expected 2 or more: a hidden layer and the classifier")
        sizes = [inputs, *[width] * (layers - 1)]
        self.hidden = nn.Sequential(*(_hidden(size, width) for size in sizes[:-1]))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [batch, classes] of the input vectors ``x`` [batch, inputs]."""
        logits: Tensor = self.classifier(self.hidden(x))
        return logits


def _hidden(inputs: int, width: int) -> nn.Sequential:
    layer: OrderedDict[str, nn.Module] = OrderedDict()
    layer["linear"] = nn.Linear(inputs, width)
    layer["norm"] = nn.BatchNorm1d(width)
    layer["activation"] = nn.ReLU()
    return nn.Sequential(layer)
