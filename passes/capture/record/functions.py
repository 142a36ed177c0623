"""Torch's functions by name: what kind each is, and how generated code calls it."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnifx.runtime.emitted import ops

METADATA = frozenset(
    "dim ndimension is_floating_point is_complex is_contiguous storage_offset data_ptr element_size get_device "
    "is_signed is_inference is_conj is_neg is_pinned is_shared untyped_storage storage _typed_storage is_same_size has_names "
    "__format__ __repr__ __str__ __hash__ __dir__ _is_view is_set_to _nnz sparse_dim dense_dim result_type is_storage "
    "promote_types can_cast _set_grad_enabled set_grad_enabled is_grad_enabled __dlpack_device__ type".split()
)
"""Functions whose result depends on neither the values nor the sizes of tensors."""

PROPERTIES = frozenset(
    "dtype device layout is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_quantized is_nested is_leaf requires_grad ndim names "
    "_version grad_fn is_mkldnn is_sparse_csr is_vulkan output_nr name is_ipu is_xla is_maia is_mtia retains_grad itemsize "
    "nbytes _backward_hooks _base __class__".split()
)
"""Tensor properties of the same kind."""

TEXTS = frozenset("__format__ __repr__ __str__".split())
"""Functions that make a text of a tensor's values."""

EFFECTS = frozenset("backward register_hook register_post_accumulate_grad_hook retain_grad _backward".split())
"""Functions that matter by what they do, not by what they return."""

PIECES = frozenset(
    "unbind split split_with_sizes chunk tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk nonzero".split()
)
"""Functions that return a number of tensors that depends on sizes."""

RAGGED = frozenset(
    "nonzero masked_select unique unique_consecutive _unique2 bincount histc combinations argwhere nms "
    "_pack_padded_sequence _pad_packed_sequence".split()
)
"""Functions whose result's shape depends on values."""

SHAPED_LIKE_FIRST = frozenset(
    "index_add index_add_ index_copy index_copy_ scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ "
    "index_put index_put_ masked_fill masked_fill_ masked_scatter set_item zeros_like ones_like full_like empty_like".split()
)
"""Functions whose result has the shape of their first argument."""

RANDOM = tuple("rand dropout bernoulli multinomial normal uniform_ exponential_ poisson cauchy_ geometric_".split())
"""Parts of the names of functions that draw random numbers."""

READS = frozenset(
    "__bool__ is_nonzero item __int__ __float__ __complex__ __index__ tolist equal allclose __contains__ numpy __array__".split()
)
"""Functions that give tensor values to Python."""

_IN_PLACE_DUNDERS = frozenset(
    f"__i{name}__" for name in "add sub mul truediv floordiv mod and or xor lshift rshift pow".split()
)
_EFFECTS = frozenset(
    {"__setitem__", "__set__", "__delete__", "backward", "register_hook", "register_post_accumulate_grad_hook"}
)


def name_of(function: Any) -> str:
    """Return the name that a function has itself."""
    return str(getattr(function, "__name__", None) or function)


def is_random(name: str) -> bool:
    """Whether a function of this name draws random numbers."""
    return any(part in name for part in RANDOM)


def writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into one of its arguments."""
    in_place = name in _IN_PLACE_DUNDERS or (name.endswith("_") and not name.endswith("__"))
    return in_place or name in _EFFECTS or kwargs.get("out") is not None or kwargs.get("inplace") is True


def is_ragged(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the shape of the function's result depends on the values of tensors."""
    if name == "repeat_interleave":
        return len(args) > 1 and isinstance(args[1], Tensor)
    if name == "where":
        return len(args) == 1
    if name == "__getitem__" and len(args) > 1:
        index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        return any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in index)
    return name in RAGGED


def is_method(function: Any) -> bool:
    """Whether the function is called as a method of its first argument."""
    if isinstance(function, types.MethodDescriptorType | types.WrapperDescriptorType):
        return True
    return isinstance(function, types.FunctionType) and getattr(Tensor, function.__name__, None) is function


def dotted_name(function: Callable[..., Any]) -> str | None:
    """Return the name under ``torch`` or ``operator`` by which generated code reaches the function, if there is one."""
    name = name_of(function)
    for module in dict.fromkeys((getattr(function, "__module__", None), *_MODULES)):
        if module is None or module.partition(".")[0] not in ("torch", "_operator", "operator", "builtins"):
            continue
        try:
            if ops.resolve(f"{module}.{name}") is function:
                return f"{module}.{name}"
        except (AttributeError, KeyError):
            continue
    return None


_MODULES = (
    *("torch", "torch.nn.functional", "torch._C._nn", "torch._C._special", "torch._C._fft", "torch._C._linalg"),
    "torch.functional",
)


def is_importable(function: Callable[..., Any]) -> bool:
    """Whether torch.fx can name the function as a call target in the code that it writes."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    return getattr(function, "__module__", None) == ops.__name__ or dotted_name(function) is not None
