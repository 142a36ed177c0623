"""Half precision in a trainer: what runs under autocast, and a scaler that keeps small gradients from vanishing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from dnifx.errors import OptimizerError, nearest
from dnifx.runtime.emitted.loss_scale import Factor
from dnifx.runtime.net.absent import home_of
from dnifx.runtime.net.net import Net


class Scaling:
    """A ``GradScaler``, as the steps of a trainer use it.

    The gradients of a step are those of the loss times a factor. Each optimizer's are divided by it before they are looked at,
    clipped and applied. After the step the factor falls if some were not finite, and rises in the long run.

    Args:
        scaler: The scaler.
        device: Where the net is.
    """

    def __init__(self, scaler: GradScaler, device: torch.device) -> None:
        self.scaler, self.device = scaler, device
        self._looked = False

    def factor(self) -> Factor:
        """Return what the loss is multiplied by now: a number on the CPU, and a tensor on a device that the host does not wait for."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        made = self.scaler.scale(torch.ones((), dtype=dtype, device=self.device))
        return made.item() if self.device.type == "cpu" else made

    @property
    def enlarges(self) -> bool:
        """Whether a gradient may have become too large by the factor alone."""
        return self.scaler.get_scale() > 1

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the factor, and note whether they are finite."""
        self.scaler.unscale_(optimizer)
        self._looked |= any(each.grad is not None for group in optimizer.param_groups for each in group["params"])

    def end(self) -> None:
        """Change the factor after a step."""
        if self._looked:
            self.scaler.update()
        self._looked = False

    def break_off(self) -> None:
        """Forget what a step noted that broke off."""
        if self._looked:
            self.scaler.update(self.scaler.get_scale())
        self._looked = False


class InAutocast(nn.Module):
    """A module under autocast.

    Args:
        module: The module.
        cast: From a function to one that runs under autocast.
    """

    def __init__(self, module: nn.Module, cast: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self.cast = module, cast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.cast(self.module.__call__)(*args, **kwargs)


@dataclass(frozen=True)
class UnderAutocast:
    """A function under autocast; unlike one that torch decorates, it can be pickled."""

    function: Callable[..., Any]
    dtype: torch.dtype
    device: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        with torch.autocast(self.device, self.dtype):
            return self.function(*args, **kwargs)


class Autocast:
    """Lets functions run under autocast; backward passes and updates are outside it.

    Args:
        dtype: What autocast casts to; None for no autocast.
        device: Where the net is.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, function: Any) -> Any:
        """Return a function or a module that runs under autocast."""
        if self.dtype is None or function is None:
            return function
        if isinstance(function, nn.Module):
            return InAutocast(function, self)
        return UnderAutocast(function, self.dtype, self.device.type)


def device_of(net: nn.Module) -> torch.device:
    """Return the device of a net's first parameter; the CPU where it has none."""
    return next((home_of(each) for each in net.parameters()), torch.device("cpu"))


def scaling_of(scaler: GradScaler | None, net: Net, ranks: tuple[int, ...]) -> Scaling | None:
    """Return what the steps of a net use of a scaler; None where it scales nothing.

    Raises:
        OptimizerError: It is no scaler, or it does not go with the net or with several processes.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, GradScaler):
        raise OptimizerError(
            f"scaler={scaler!r}: give a gradient scaler, such as torch.amp.GradScaler('cuda'), or None"
        )
    if not scaler.is_enabled():
        return None
    halves = [name for name, each in net.named_parameters() if each.dtype == torch.float16]
    if halves:
        raise OptimizerError(
            f"scaler= does not go with parameters in float16 ({nearest('', halves, 3)}), whose unscaled gradients would vanish: keep the "
            "model in float32, and give net.trainer(..., autocast=torch.float16)"
        )
    if net.program.parts:
        raise OptimizerError(
            "scaler= does not go with every=, where parts fire in turn and each would need a factor of its own: give "
            "autocast=torch.bfloat16, which needs no scaler"
        )
    if ranks:
        raise OptimizerError(
            "scaler= does not go with places=, where no process knows whether gradients of the others are finite: give "
            "autocast=torch.bfloat16, which needs no scaler"
        )
    return Scaling(scaler, device_of(net))
