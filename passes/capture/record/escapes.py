"""Sees the operations that never pass a torch function, and the tensors that are made inside modules kept whole."""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnifx.passes.capture.record.functions import is_random
from dnifx.passes.capture.record.state import ParameterWatch, Snapshot


class Watched(Protocol):
    """The recorder, as far as it matters here."""

    active: bool
    inside_leaf: str | None


@dataclass(frozen=True)
class Escape:
    """A tensor that the recorder did not see being made."""

    tensor: Tensor
    operation: str
    constant: bool


class Escapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode beside the recorder.

    Args:
        recorder: The recorder.
        snapshot: Hears of parameters that are about to be written.
    """

    def __init__(self, recorder: Watched, snapshot: Snapshot) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._watch = ParameterWatch(snapshot)
        self._escaped: dict[int, Escape] = {}
        self._made: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports the whole of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and remember who made its result."""
        self._watch.look(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self._recorder.active:
            self._escape(func, args, result)
        elif self._recorder.inside_leaf is not None:
            for tensor in _tensors(result):
                self._made[id(tensor)] = weakref.ref(tensor), self._recorder.inside_leaf
        return result

    def _escape(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Remember a tensor made outside of torch functions; one that is made of no other is a constant."""
        constant = all(self.is_constant(item) for item in tree_leaves(args) if isinstance(item, Tensor))
        constant = constant and not is_random(str(func))
        for tensor in _tensors(result):
            self._escaped[id(tensor)] = Escape(tensor, str(func), constant)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor was made outside of torch functions."""
        return id(tensor) in self._escaped

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the tensor was made outside of torch functions, of no other tensor."""
        escape = self._escaped.get(id(tensor))
        return escape is not None and escape.constant

    def operation(self, tensor: Tensor) -> str:
        """Return the operation that made an escaped tensor."""
        return self._escaped[id(tensor)].operation

    def maker(self, tensor: Tensor) -> str | None:
        """Return the path of the module kept whole that made the tensor, if one did."""
        reference, path = self._made.get(id(tensor), (None, None))
        return path if reference is not None and reference() is tensor else None


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
