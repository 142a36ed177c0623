"""Train the network of the tutorial, with four kinds of gradient on the cuts."""

from pathlib import Path

import torch
from model import Classifier
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import dnifx

pixels, digits = map(torch.from_numpy, load_digits(return_X_y=True))
images = pixels.float() / 16
TRAIN, TEST = slice(0, 1500), slice(1500, None)
STEPS = 300


def error(model: nn.Module) -> float:
    """Return the share of the test digits that the model gets wrong, in percent."""
    with torch.no_grad():
        return 100 * (model(images[TEST]).argmax(1) != digits[TEST]).float().mean().item()


def fit(gradient: str, checkpoint: Path | None = None) -> nn.Module:
    """Train a fresh network, or go on from a checkpoint, and return it."""
    torch.manual_seed(0)
    model = Classifier()
    net = dnifx.decouple(
        model, "blocks.*", args=images[:32], loss=cross_entropy, gradient=gradient, context="label", num_classes=10
    )
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=2e-3))
    if checkpoint is not None and checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint))
    while trainer.steps < STEPS:
        batch = torch.randint(1500, (32,))
        trainer.step(images[TRAIN][batch], target=digits[TRAIN][batch])
    if checkpoint is not None:
        torch.save(trainer.state_dict(), checkpoint)
    return model


if __name__ == "__main__":
    # "oracle" puts the true gradient on every cut: backpropagation.
    for gradient in ("oracle", "zero", "synthetic", "suffix"):
        print(f"{gradient:10} {error(fit(gradient)):4.1f}% of the test digits are wrong")
    model = fit("suffix", Path("suffix.pt"))
    torch.save(model.state_dict(), "weights.pt")
