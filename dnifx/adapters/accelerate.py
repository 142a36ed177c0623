"""Accelerate: ``accelerator.backward(loss)`` divides the loss for accumulation, and scales it in half precision."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dnifx.adapters.nets import factor, nets_of
from dnifx.runtime.emitted.loss_scale import Factor


@dataclass(frozen=True)
class AcceleratorScale:
    """What an accelerator multiplies the loss by now."""

    accelerator: Any

    def __call__(self) -> Factor:
        """Return the factor."""
        return factor(self.accelerator.scaler, self.accelerator.gradient_accumulation_steps)


def tell_loss_scale(accelerator: Any, module: nn.Module) -> None:
    """Let the nets in a module know what an ``accelerate.Accelerator`` multiplies the loss by.

    Args:
        accelerator: The accelerator.
        module: What it trains.

    Raises:
        InputError: The module holds no net.
    """
    for net in nets_of(module):
        net.loss_scale = AcceleratorScale(accelerator)
