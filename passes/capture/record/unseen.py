"""Finds tensors that the recorder did not see being made: by operations that no torch function shows, or inside kept modules."""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnifx.passes.capture.record.functions import is_random
from dnifx.passes.capture.record.state import ParameterWatch, Snapshot


class RunningRecorder(Protocol):
    """The recorder, as far as it matters here."""

    active: bool
    inside_leaf: str | None


@dataclass(frozen=True)
class UnseenTensor:
    """A tensor that no torch function made; a constant where it was made from no other tensor."""

    tensor: Tensor
    operation: str
    constant: bool


class UnseenTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that runs beside the recorder and sees every operation.

    Args:
        recorder: The recorder.
        snapshot: Is told of parameters that are about to be written.
    """

    def __init__(self, recorder: RunningRecorder, snapshot: Snapshot) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._watch = ParameterWatch(snapshot)
        self._unseen: dict[int, UnseenTensor] = {}
        self._made: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports the whole of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and remember who made its result."""
        if func._schema.is_mutable:
            self._watch.look(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self._recorder.active:
            constant = all(self.is_constant(item) for item in _tensors(args)) and not is_random(str(func))
            for tensor in _tensors(result):
                self._unseen[id(tensor)] = UnseenTensor(tensor, str(func), constant)
        elif self._recorder.inside_leaf is not None:
            for tensor in _tensors(result):
                self._made[id(tensor)] = weakref.ref(tensor), self._recorder.inside_leaf
        return result

    def find(self, tensor: Tensor) -> UnseenTensor | None:
        """Return what is known of a tensor that no torch function made, or None for any other."""
        return self._unseen.get(id(tensor))

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether no torch function made the tensor, and it was made from no other tensor."""
        unseen = self.find(tensor)
        return unseen is not None and unseen.constant

    def maker(self, tensor: Tensor) -> str | None:
        """Return the path of the kept module that made the tensor, if one did."""
        reference, path = self._made.get(id(tensor), (None, None))
        return path if reference is not None and reference() is tensor else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
