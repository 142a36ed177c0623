"""What the parts of a system are trained on: a loss for each of them that has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import LossError, nearest
from dnifx.runtime.training.losses import Loss


@dataclass(frozen=True)
class PartLoss:
    """What a part's outputs are compared by.

    Attributes:
        name: The name the user gave it; None for the only loss there is.
        function: (outputs, target) to a scalar or one loss an example; the outputs are one tensor, or a tuple of several.
        mean: Whether it averages over examples (else it sums).
    """

    name: str | None
    function: Loss
    mean: bool

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the loss of what a part gave: its one result, or (results, what it gives, next states)."""
        results = (output,) if isinstance(output, Tensor) else output[0]
        return self.function(results[0] if len(results) == 1 else results, target)

    def target_among(self, target: Any) -> Any:
        """Return the part's target.

        Raises:
            LossError: It is missing.
        """
        if self.name is None:
            return target
        if not isinstance(target, Mapping) or self.name not in target:
            given = nearest("", target) if isinstance(target, Mapping) else type(target).__name__
            raise LossError(
                f"the part of {self.name!r} fires in this window, and its target is missing (got {given}); give "
                f"target={{{self.name!r}: ...}} beside those of the other parts that fire"
            )
        return target[self.name]


def nothing(output: Any, target: Any) -> Tensor:
    """Return the loss of a part that has none: zero, by which its backward pass begins."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([0 * leaf.sum() for leaf in leaves]).sum() if leaves else torch.zeros(())
