"""A network of our own, for the tutorial."""

from torch import Tensor, nn


class Classifier(nn.Module):
    """Three hidden layers and a readout, for images of 8 by 8 pixels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(before, width), nn.ReLU()) for before in (64, width, width))
        self.readout = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of 10 digits, shape ``[batch, 10]``, for pixels of shape ``[batch, 64]``."""
        values = images
        for block in self.blocks:
            values = block(values)
        scores: Tensor = self.readout(values)
        return scores
