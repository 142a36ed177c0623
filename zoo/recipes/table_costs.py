"""What a training step costs: its operations, and the memory that it holds for its backward passes, both counted in one step."""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
ON_CPU = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}
"""The CPU's attention, for which torch has no formulas, and the GPU's, which multiplies as much."""


@dataclass(frozen=True)
class Costs:
    """What one training step costs.

    Attributes:
        flops: Floating-point operations of matrix products, convolutions and attention, forward and backward, heads
            and estimators included.
        held_bytes: The most bytes of activations that backward passes wait for at a time, those of heads included.
            Parameters, gradients and the states of optimizers are not among them.
    """

    flops: int
    held_bytes: int


def costs_of(step: Callable[[], object], module: nn.Module) -> Costs:
    """Return what a call costs.

    Args:
        step: Makes a training step.
        module: Its parameters and buffers are no activations.
    """
    held = Held({each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())})
    with Operations() as operations, saved_tensors_hooks(held.pack, Saved.unpack):
        step()
    return Costs(operations.flops, held.peak)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        given = kwargs or {}
        result = func(*args, **given)
        formula = flop_registry.get(ON_CPU.get(func._overloadpacket, func._overloadpacket))
        if formula is not None:
            self.flops += formula(*args, **given, out_val=result)
        return result


@dataclass(frozen=True, eq=False)
class Saved:
    """A tensor that a backward pass waits for."""

    tensor: Tensor

    def unpack(self) -> Tensor:
        """Return the tensor."""
        return self.tensor


@dataclass
class Held:
    """Counts the bytes of all tensors that are saved at a time, each storage once.

    Attributes:
        apart: Addresses of storages that do not count.
        users: By address, how many saved tensors share a storage.
        bytes: Bytes held now.
        peak: The most bytes held so far.
    """

    apart: set[int]
    users: Counter[int] = field(default_factory=Counter)
    bytes: int = 0
    peak: int = 0

    def pack(self, tensor: Tensor) -> Saved:
        """Count a tensor until the graph lets go of it."""
        saved, storage = Saved(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.apart:
            self.users[address] += 1
            self.bytes += size if self.users[address] == 1 else 0
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(saved, self.let_go, address, size)
        return saved

    def let_go(self, address: int, size: int) -> None:
        """Count a tensor no longer."""
        self.users[address] -= 1
        self.bytes -= 0 if self.users[address] else size
