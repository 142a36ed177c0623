"""Lets graphs with torch's operators be pickled: an operator by its name."""

import copyreg

import torch
from torch._ops import OpOverload


def operator(namespace: str, name: str, overload: str) -> OpOverload:
    """Return torch's operator of a name."""
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found


def reduced(op: OpOverload) -> tuple[object, tuple[str, str, str]]:
    """Return how an operator is found again."""
    namespace, name = op._schema.name.split("::")
    return operator, (namespace, name, op._overloadname)


copyreg.pickle(OpOverload, reduced)  # type: ignore[arg-type]
