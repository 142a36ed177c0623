"""The paper's models, their data, and recipes that train them (``dnifx.zoo.recipes``)."""

from dnifx.zoo.cnn import CNN
from dnifx.zoo.fcn import FCN
from dnifx.zoo.models import MODELS, ZooModel

__all__ = ["CNN", "FCN", "MODELS", "ZooModel"]
