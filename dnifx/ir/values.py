"""What is known of values, nodes and modules before they run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is computed: ``f32[8, 3, 5, 5]``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    layout: torch.layout = torch.strided

    @property
    def has_estimates(self) -> bool:
        """Whether an estimator can answer with its gradient: a dense tensor of real floating point."""
        return self.dtype.is_floating_point and self.layout is torch.strided

    @property
    def bytes(self) -> int:
        """Size of the elements in bytes."""
        return self.elements * self.dtype.itemsize

    @property
    def is_image(self) -> bool:
        """Whether it has the four dimensions of [batch, channels, height, width]."""
        return len(self.shape) == 4

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def elements_per_example(self) -> int:
        """Number of elements of one example, where the first dimension counts examples."""
        return torch.Size(self.shape[1:]).numel()

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")
        layout = "" if self.layout is torch.strided else f"{str(self.layout).removeprefix('torch.')} "
        return f"{layout}{kind}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Holder:
    """The structure of a value that is not a tensor.

    Attributes:
        kind: Its class.
        parts: The parts of a tuple, a list or a dict with strings as keys, by index or key: another holder, or None for a
            tensor or a plain value. Empty for other classes.
    """

    kind: type
    parts: tuple[tuple[Any, "Holder | None"], ...] = ()


@dataclass(frozen=True)
class Measure:
    """What one node makes and costs, measured on fake tensors.

    Attributes:
        tensors: The specs of the tensors in the node's value, in pytree order.
        is_tensor: Whether the value is one tensor, not a tuple, a number, ...
        flops: Floating-point operations of its forward, as ``torch.utils.flop_counter`` counts them.
        parameter_bytes: Bytes of the parameters that the node reads.
        activation_bytes: Bytes of the tensors that the node makes (views make none).
        storages: A number for each tensor's storage; tensors with equal numbers are aliases.
        writes: Names of the argument nodes whose memory this node writes in place.
        random: Whether it draws random numbers.
        holder: The structure of the value, where it is not a tensor.
    """

    tensors: tuple[TensorSpec, ...] = ()
    is_tensor: bool = False
    flops: int = 0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    storages: tuple[int, ...] = ()
    writes: tuple[str, ...] = ()
    random: bool = False
    holder: Holder | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor of the value carries a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the value."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def cost(self) -> int:
        """Cost of the node for balancing: its FLOPs, and one for each element that it makes."""
        return self.flops + sum(tensor.elements for tensor in self.tensors)


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a node lies in or calls; empty for the root."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return next((entry[0] for entry in reversed(stack.values())), "")


def count_parameters(module: nn.Module) -> int:
    """Count the elements of a module's parameters, shared ones once, and those without a size as 0."""
    sized = (each for each in module.parameters() if not isinstance(each, nn.parameter.UninitializedParameter))
    return sum(parameter.numel() for parameter in sized)
