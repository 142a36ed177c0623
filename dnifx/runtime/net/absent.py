"""Weights that this process does not hold: they keep their shape and take no memory, and reading one is an error that says where it is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dnifx.errors import StateError

_READS = (
    "shape dtype device layout grad requires_grad is_leaf ndim grad_fn is_sparse is_meta is_cuda is_cpu nbytes itemsize"
)
_METHODS = (
    "size dim numel nelement element_size stride is_contiguous is_floating_point is_complex requires_grad_ __len__"
)

ALLOWED = frozenset(
    {getattr(Tensor, name).__get__ for name in _READS.split()}
    | {getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")}
    | {getattr(Tensor, name) for name in _METHODS.split()}
)
"""What can be asked of a weight that is not here: its form, and whether it learns."""


class Absent(Tensor):
    """A tensor without values.

    Attributes:
        note: What the error says.
        home: The device that it is on where it is held.
    """

    note: str
    home: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what its form alone says.

        Raises:
            StateError: Its values are asked for.
        """
        if func in ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise StateError(next(each.note for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Absent)))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype})"


class AbsentParameter(Absent, nn.Parameter):
    """A parameter without values."""


def let_go(tensor: Tensor, note: str) -> bool:
    """Free the memory of a tensor. Whoever holds it holds one without values then, until ``hold`` gives it memory again.

    Returns:
        Whether it could be done. Subclasses of tensors, and those that something else hooks into, stay as they are.
    """
    if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_leaf or tensor.layout is not torch.strided:
        return False
    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
        return False
    kind = AbsentParameter if isinstance(tensor, nn.Parameter) else Absent
    made = Tensor._make_subclass(kind, torch.empty_like(tensor, device="meta"), tensor.requires_grad)
    home = torch.device("cpu") if tensor.is_meta else tensor.device
    vars(made).update(vars(tensor), note=note, home=home)
    try:
        torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]
    except RuntimeError:  # something else refers to it
        return False
    return True


def home_of(tensor: Tensor) -> torch.device:
    """Return the device of a tensor, or, where it is without values, that where it gets them."""
    return tensor.home if isinstance(tensor, Absent) else tensor.device


def hold(tensor: Tensor) -> None:
    """Give a tensor without values memory again; what is in it is not defined."""
    if not isinstance(tensor, Absent):
        return
    with torch._C.DisableTorchFunctionSubclass():
        empty, kept = torch.empty_like(tensor, device=tensor.home), dict(vars(tensor))
        made: Tensor = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        del kept["note"], kept["home"]
        vars(made).update(kept)
        torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]
