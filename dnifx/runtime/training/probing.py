"""Probes: how good synthetic gradients are on a batch, with nothing changed by looking."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dnifx.errors import InputError
from dnifx.runtime.emitted.ops import GuardError
from dnifx.runtime.module.input_kinds import InputKind, Undo

if TYPE_CHECKING:
    from dnifx.runtime.training.trainer import Trainer

Diagnostics = Mapping[str, Mapping[str, Tensor]]
"""By boundary name, how an estimate compares with a target, as ``dnifx.runtime.emitted.interface.compare`` says."""


@dataclass(frozen=True)
class Probe:
    """How good the synthetic gradients are on one batch.

    Attributes:
        loss: The loss, a scalar.
        true: By boundary name, the estimate beside the gradient of backpropagation through the whole model.
        bootstrapped: The estimate beside the gradient that it is fitted to, which contains the estimates further on.
    """

    loss: Tensor
    true: Diagnostics
    bootstrapped: Diagnostics


def probe(trainer: "Trainer", args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, context: Any) -> Probe:
    """Compare every estimate with its target, true and bootstrapped; weights, buffers, gradients and random state stay."""
    args, kwargs = trainer.window.filled(args, kwargs)
    for input_kind in trainer.net.matching(args, kwargs):
        inputs = input_kind.signature.flatten(args, kwargs)
        try:
            found = [run_probe(trainer, input_kind, inputs, target, context, true) for true in (True, False)]
        except GuardError:
            continue
        (loss, true_found), (_, bootstrapped) = found
        return Probe(loss.detach(), true_found, bootstrapped)
    raise InputError("no captured graph holds for these inputs")


def run_probe(
    trainer: "Trainer", input_kind: InputKind, inputs: tuple[Any, ...], target: Any, context: Any, true: bool
) -> tuple[Tensor, Diagnostics]:
    """Run one of the two steps of a probe."""
    step = trainer.functions.probing(input_kind, true)
    with untouched(trainer.net), torch.enable_grad():
        loss, _, diagnostics = step(trainer.functions.parts(input_kind), *inputs, target, context)
    names = [boundary.name for boundary in trainer.net.boundaries]
    return loss, {name: diagnostics[name] for name in names if name in diagnostics}


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Put gradients, buffers and random state back afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    before = Undo(net)
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        before.restore()
