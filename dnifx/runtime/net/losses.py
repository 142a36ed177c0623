"""The losses of a net: one for its whole output, or one for each part that has one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.errors import LossError, nearest

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class PartLoss:
    """What a part's outputs are compared by.

    Attributes:
        function: (output, target) to a scalar or one loss an example.
        mean: Whether it averages over examples (else it sums).
        name: The name the user gave it; None for the only loss there is.
        of_results: Whether the output is that of one of several parts, (results, values it gives, next states). Then the
            function sees the results: one tensor, or a tuple of several.
    """

    function: Loss
    mean: bool
    name: str | None = None
    of_results: bool = False

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Return the loss of an output."""
        if not self.of_results:
            return self.function(output, target)
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
                f"the part of {self.name!r} fires in this window, and its target is missing (got {given}). Give "
                f"target={{{self.name!r}: ...}} beside those of the other parts that fire"
            )
        return target[self.name]


def no_loss(output: Any, target: Any) -> Tensor:
    """Return the loss of a part that has none: zero, so that its backward pass has a place to begin."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([0 * leaf.sum() for leaf in leaves]).sum() if leaves else torch.zeros(())
