"""What operations cost: floating-point operations by torch's own formulas, and what torch has no formula for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

RECURRENT = (torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn, torch.ops.aten.miopen_rnn)
"""Fused recurrent layers, for which torch has no formula; elsewhere they are made of operations that it counts."""


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations, by torch's own formulas, and operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        given = kwargs or {}
        result = func(*args, **given)
        self.draws += torch.Tag.nondeterministic_seeded in func.tags
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **given, out_val=result)
        elif func._overloadpacket in RECURRENT:
            self.flops += recurrent_flops(*args)
        return result


def recurrent_flops(values: Tensor, weights: Tensor | Sequence[Tensor], *others: Any) -> int:
    """Return the FLOPs of a fused recurrent layer: each weight matrix multiplies a vector of each step of each example."""
    given = [weights, others[0]] if isinstance(weights, Tensor) else weights
    matrices = sum(weight.numel() for weight in given if weight.dim() == 2)
    return 2 * (values.numel() // values.shape[-1]) * matrices
