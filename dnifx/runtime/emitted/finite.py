"""Updates that are not made because a gradient is not finite, and the buffers that go back with them."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnifx.errors import LossError, OptimizerError

Flag = bool | Tensor
"""Whether something was not finite; a tensor on a device that the host does not wait for."""


def not_finite(gradients: Sequence[Tensor]) -> Flag:
    """Whether a gradient is not finite: at once on the CPU, and as a tensor elsewhere."""
    sums = [each.sum(dtype=torch.float32) if each.itemsize < 4 else each.sum() for each in gradients]
    if all(each.is_cpu for each in sums):
        return not math.isfinite(abs(sum([each.item() for each in sums])))
    device = next(each.device for each in sums if each.device.type != "cpu")
    return ~torch.stack([each.isfinite().to(device) for each in sums]).all()


def clear_where(bad: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Set gradients to zero where a flag on the device says so."""
    for each in parameters:
        if each.grad is not None:
            each.grad = torch.where(bad, torch.zeros_like(each.grad), each.grad)


def step_unless(optimizer: Optimizer, bad: Tensor) -> None:
    """Step an optimizer, and leave parameters and state as they were where a flag on the device says so.

    An optimizer that knows of a gradient scaler's flag (``fused=True``) is given it. Any other steps on zeros, and then goes back;
    the number of its steps, which it counts on the host, goes on.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    tensors = changed(optimizer, bad)
    before = [each.detach().clone() for each in tensors]
    optimizer.step()
    put_back(tensors, before, bad)


def trained(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer that have a gradient."""
    return [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]


def changed(optimizer: Optimizer, bad: Tensor) -> list[Tensor]:
    """Return what a step changes on the device of a flag, after setting the gradients to zero where the flag says so."""
    parameters = trained(optimizer)
    clear_where(bad, parameters)
    states = [optimizer.state.get(each, {}) for each in parameters]
    return [*parameters, *(value for state in states for value in tensors_of(state, bad.device))]


def tensors_of(state: Mapping[str, Any], device: torch.device) -> list[Tensor]:
    """Return the tensors of a parameter's state that lie on a device."""
    return [each for each in state.values() if isinstance(each, Tensor) and each.device.type == device.type]


def put_back(tensors: Sequence[Tensor], before: Sequence[Tensor], bad: Flag) -> None:
    """Put back what tensors held before, where a flag says so."""
    with torch.no_grad():
        for each, value in zip(tensors, before, strict=True):
            each.copy_(value if isinstance(bad, bool) else torch.where(bad.to(each.device), value, each))


def either(flags: Iterable[Flag]) -> Flag:
    """Whether any flag is set."""
    found: Flag = False
    for flag in flags:
        found = found | flag
    return found


def is_on(flag: Flag, device: torch.device) -> bool:
    """Whether a flag is known on a device without waiting for another: the host's own flags are."""
    return isinstance(flag, bool) or flag.device == device


class Statistics:
    """The buffers that a step writes, such as running averages: they go back where what they belong to is not updated.

    Args:
        owners: The buffers of each partition or estimator, by the name of what is updated.
    """

    def __init__(self, owners: Mapping[str, Sequence[Tensor]]) -> None:
        self.owners = {name: list(buffers) for name, buffers in owners.items() if buffers}
        self._before: dict[str, list[Tensor]] = {}

    def begin(self) -> None:
        """Keep what they hold before a step."""
        self._before = {name: [each.clone() for each in buffers] for name, buffers in self.owners.items()}

    def end(self, refused: Mapping[str, Flag], otherwise: Flag) -> None:
        """Put back those of what was refused; ``otherwise`` is for what has nothing to update."""
        for name, before in self._before.items():
            bad = refused.get(name, otherwise)
            if bad is not False:
                put_back(self.owners[name], before, bad)
        self._before = {}


def why_not_updated(name: str, call: str) -> str:
    """Return the text of the error where a gradient is not finite; ``call`` is what takes ``on_nonfinite``."""
    return (
        f"the gradient of {name} is not finite, so it was not updated: look at the inputs and targets of this batch, or "
        f"lower the learning rate; {call}(..., on_nonfinite='skip') leaves such updates out and goes on"
    )


class FiniteUpdates:
    """Keeps optimizers from updates whose gradients are not finite, by hooks on their steps.

    Args:
        optimizers: The optimizers, by the name of what each updates.
        buffers: The buffers of each, which go back where it is not updated.
        on_nonfinite: ``"raise"`` breaks the step off with an error, ``"skip"`` goes on.

    Attributes:
        flags: Whether each was kept from its update in the last step.

    Raises:
        OptimizerError: ``on_nonfinite`` is neither.
    """

    def __init__(
        self, optimizers: Mapping[str, Optimizer], buffers: Mapping[str, Sequence[Tensor]], on_nonfinite: str
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise OptimizerError(f"on_nonfinite={on_nonfinite!r}: give 'raise' or 'skip'")
        self.on_nonfinite, self.statistics = on_nonfinite, Statistics(buffers)
        self.flags: dict[str, Flag] = {}
        self._kept: dict[str, tuple[list[Tensor], list[Tensor], Tensor]] = {}
        for name, optimizer in optimizers.items():
            optimizer.register_step_pre_hook(partial(self._before, name))
            optimizer.register_step_post_hook(partial(self._after, name))

    @property
    def skipped(self) -> list[str]:
        """The names of what the last step did not update; on a GPU this waits for it."""
        return [name for name, flag in self.flags.items() if flag]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch one step: the buffers of what it does not update go back."""
        self.flags = {}
        self.statistics.begin()
        try:
            yield
        except BaseException:
            self.statistics.end({name: self.flags.get(name, True) for name in self.statistics.owners}, True)
            raise
        self.statistics.end(self.flags, either(self.flags.values()))

    def _before(self, name: str, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = trained(optimizer)
        bad = self.flags[name] = not_finite([each.grad for each in parameters if each.grad is not None])
        if isinstance(bad, Tensor):
            tensors = changed(optimizer, bad)
            self._kept[name] = tensors, [each.detach().clone() for each in tensors], bad
        elif bad:
            for each in parameters:
                each.grad = None
            if self.on_nonfinite == "raise":
                raise LossError(why_not_updated(name, "Trainer"))

    def _after(self, name: str, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if name in self._kept:
            put_back(*self._kept.pop(name))


def watched(step: Callable[..., Any]) -> Callable[..., Any]:
    """Let the ``finite`` of a trainer, a ``FiniteUpdates``, watch each of its steps."""

    @functools.wraps(step)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.finite.watched():
            return step(self, *args, **kwargs)

    return run
