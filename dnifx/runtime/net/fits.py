"""What becomes of the fits of a fused net: they stay in ``.grad`` for the loop's optimizer, or the net applies them itself."""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd import Variable
from torch.optim import Optimizer

from dnifx.errors import DnifxWarning, OptimizerError
from dnifx.runtime.emitted.finite import not_finite, step_unless, trained
from dnifx.runtime.emitted.loss_scale import Factor

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

PILED = 3
"""Backward passes in a row that found fits which nobody cleared, before a warning."""
LOOKED = 16
"""Backward passes in which gradients are looked at for being zero, which waits for a GPU."""


class FitWatch:
    """Looks at the start of each backward pass whether fits pile up, and whether the loss is scaled without the net's knowledge.

    Each warning is given once.

    Args:
        fitted: The parameters of estimators and input models.
        model: Parameters of the model to which a backward pass comes after all interfaces.

    Attributes:
        scale_is_said: Whether the loop has said what it multiplies the loss by.
    """

    def __init__(self, fitted: Sequence[nn.Parameter], model: Sequence[nn.Parameter]) -> None:
        self.fitted = [each for each in fitted if each.requires_grad]
        self.model = [each for each in model if each.requires_grad]
        self.scale_is_said = self.known = False
        self.passes = self.piled = self.looked = 0
        self.warned: set[str] = set()

    def begins(self, factor: Factor, known: bool) -> None:
        """Look at the gradients that earlier backward passes left; ``known``: the loss itself says its factor."""
        self.passes += 1
        self.known = known
        if not self.model or not any(each.grad is not None for each in self.fitted) or self.looked >= LOOKED:
            self.piled = 0
            return
        self.looked += 1
        if not left(self.fitted):
            self.piled = 0
        elif any(each.grad is not None for each in self.model):
            if not (known or self.scale_is_said):
                self.warn(
                    "gradients accumulate over several backward passes. If the loss is divided for that (loss / k), the net has to know: "
                    "set net.loss_scale = 1 / k, or the fits of the estimators are k times too steep. If it is not divided, set "
                    "net.loss_scale = 1.0"
                )
        else:
            self.piled += 1
            if self.piled == PILED:
                self.warn(
                    f"{PILED} backward passes have fitted the estimators, and nobody has applied or cleared what they left in .grad, so "
                    "the estimators do not learn. Make the optimizer of net.parameters(), after dnifx.decouple; or give "
                    "dnifx.decouple(..., estimator_optimizer=), and the net applies the fits itself"
                )

    def called(self) -> None:
        """Look, in one call of the net, whether the loop that calls it has a ``GradScaler``."""
        if self.passes != PILED - 1 or self.known or self.scale_is_said:
            return
        if scales(sys._getframe(1)):
            self.warn(
                "the loop has a GradScaler, and the net was not told. If it scales the loss of this net, the estimators are fitted to "
                "gradients that are as many times too large. Set net.loss_scale = scaler (or, if it does not, net.loss_scale = 1.0)"
            )

    def warn(self, text: str) -> None:
        """Warn once of each thing."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, DnifxWarning, stacklevel=2)


def left(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a gradient is left on a parameter; zeros are none."""
    return any(each.grad is not None and bool(each.grad.any()) for each in parameters)


def scales(frame: FrameType | None) -> bool:
    """Whether a function that is being run, or the object whose method it is, has a gradient scaler that scales."""
    while frame is not None:
        held = [*frame.f_locals.values(), *frame.f_globals.values()]
        held += vars(frame.f_locals["self"]).values() if hasattr(frame.f_locals.get("self"), "__dict__") else ()
        if any(issubclass(type(each), GradScaler) and each.is_enabled() and each.get_scale() != 1 for each in held):
            return True
        frame = frame.f_back
    return False


class OwnFits:
    """Applies the fits after each backward pass, and leaves nothing in ``.grad`` of the estimators.

    Fits are applied in units of the true loss, whatever it was multiplied by. Where one of them is not finite, none is applied:
    after an overflow in half precision the loop makes no update either.

    Args:
        parameters: The parameters of estimators and input models.
        make: From parameters to an optimizer.

    Raises:
        OptimizerError: It gives none, or there is nothing to fit.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], make: MakeOptimizer) -> None:
        fitted = [each for each in parameters if each.requires_grad]
        if not fitted:
            raise OptimizerError("estimator_optimizer= was given, but no estimator of this net learns; leave it out")
        self.optimizer = make(fitted)
        if not isinstance(self.optimizer, Optimizer):
            raise OptimizerError(
                f"estimator_optimizer= gave {type(self.optimizer).__name__}; give a callable from parameters to an optimizer, such as "
                "lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
            )
        self.factor: Factor = 1.0

    def begins(self, factor: Factor, known: bool) -> None:
        """Ask to be called when the backward pass has ended."""
        self.factor = factor
        engine: Any = Variable._execution_engine
        engine.queue_callback(
            lambda: engine.queue_callback(self.apply)
        )  # after what others have asked for, such as DDP

    def apply(self) -> None:
        """Apply the fits; a GPU is not waited for."""
        if not (isinstance(self.factor, float) and self.factor == 1):
            unscale(self.optimizer, self.factor)
        bad = not_finite([each.grad for each in trained(self.optimizer) if each.grad is not None])
        if isinstance(bad, Tensor):
            step_unless(self.optimizer, bad)
        elif not bad:
            self.optimizer.step()
        self.optimizer.zero_grad()


def unscale(optimizer: Optimizer, factor: Factor) -> None:
    """Divide the gradients of an optimizer by a factor."""
    gradients: list[Tensor] = [
        each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None
    ]
    if gradients:
        torch._foreach_div_(gradients, factor)
