"""What a training step gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted.finite import Flag


@dataclass(frozen=True)
class StepResult:
    """What a training step gives.

    Attributes:
        output: The model's output. None where the schedule left the last partition idle; with several rates, None in the
            places of parts that did not fire.
        losses: By the name of each loss that was computed, the loss, detached; under ``"loss"`` where it has no name. The own
            losses that were trained are there by attribute, times their weights.
        diagnostics: By boundary name, how the synthetic gradient compares with the target; empty unless asked for.
        skipped: By the name of what is updated, whether its update was not made since a gradient was not finite: only those where
            that is so on the CPU, and scalars on the device elsewhere.
    """

    output: Any
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    skipped: Mapping[str, Flag] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor | None:
        """The loss, a scalar; the sum where there are several; None where none was computed in this step."""
        found = list(self.losses.values())
        return torch.stack(found).sum() if len(found) > 1 else next(iter(found), None)
