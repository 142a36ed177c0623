"""What the adapters share: the nets in a module, and the factor of a framework."""

import torch
from torch import nn
from torch.amp import GradScaler

from dnifx.errors import InputError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted.loss_scale import Factor


def nets_of(module: nn.Module) -> list[DecoupledModule]:
    """Return the decoupled modules in a module, itself among them.

    Raises:
        InputError: There is none.
    """
    found = [each for each in module.modules() if isinstance(each, DecoupledModule)]
    if not found:
        raise InputError(
            f"{type(module).__name__} holds no net of dnifx.decouple, so that there is nothing to tell the loss scale; give the module "
            "that the framework trains"
        )
    return found


def factor(scaler: GradScaler | None, parts: int) -> Factor:
    """Return what a loss is multiplied by that is divided by a number of micro-batches, and then scaled."""
    if scaler is None or not scaler.is_enabled():
        return 1 / parts
    return scaler.scale(torch.ones((), device=scaler._device)) / parts
