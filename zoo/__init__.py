"""The paper's models and some of today's, their data sets, and recipes to train them (``dnifx.zoo.recipes``).

A public name is imported when it is first used, so that ``dnifx train --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "dnifx.zoo":
    raise ImportError(
        f"this package is dnifx.zoo; import it so, because its classes under {__name__!r} would be others"
    )

if TYPE_CHECKING:
    from dnifx.zoo.cnn import CNN
    from dnifx.zoo.fcn import FCN
    from dnifx.zoo.language_model import LanguageModel
    from dnifx.zoo.models import MODELS, ZooModel
    from dnifx.zoo.resnet import ResNet
    from dnifx.zoo.vit import ViT

__all__ = ["CNN", "FCN", "MODELS", "LanguageModel", "ResNet", "ViT", "ZooModel"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name in __all__:
            return getattr(import_module("dnifx.zoo.models"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the public names too that nobody has used yet."""
        return sorted({*globals(), *__all__})
