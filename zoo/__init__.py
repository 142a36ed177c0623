"""The paper's models, their data, and recipes that train them (``dnifx.zoo.recipes``)."""

if __name__ != "dnifx.zoo":
    raise ImportError(f"this package is dnifx.zoo; import it so, for as {__name__!r} its classes would be others")

from dnifx.zoo.cnn import CNN
from dnifx.zoo.fcn import FCN
from dnifx.zoo.models import MODELS, ZooModel

__all__ = ["CNN", "FCN", "MODELS", "ZooModel"]
