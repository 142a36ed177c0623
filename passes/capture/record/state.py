"""What a run of the model changes: saved before the run, put back after it."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Generators = tuple[Tensor, tuple[Tensor, ...], Any, Any]
"""States of torch's CPU and CUDA generators, Python's and NumPy's."""


def generators() -> Generators:
    """Return the state of the random number generators."""
    cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def set_generators(states: Generators) -> None:
    """Put the random number generators back."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(list(states[1]))
    random.setstate(states[2])
    np.random.set_state(states[3])


def seed(number: int) -> None:
    """Seed every generator."""
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # where there is no device, torch.manual_seed formats a traceback for each kind that it defers
        torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def python_draws() -> tuple[Any, ...]:
    """Return a value that changes whenever Python or NumPy draws a random number."""
    _, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return words[-1], words[:2], gauss, numpy_state["state"]["pos"], numpy_state["state"]["key"][:2].tobytes()


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Snapshot:
    """A model's parameters, buffers, attributes and training flags, and the states of all generators."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._attributes = [
            {name: value for name, value in vars(module).items() if name not in _REGISTRIES} for module in self._modules
        ]
        self._contents = [
            (item, type(item)(item))
            for held in self._attributes
            for item in held.values()
            if type(item) in (dict, list, set)
        ]
        registries = [held for module in self._modules for held in (module._parameters, module._buffers)]
        self._registries: list[tuple[Any, Any]] = [(held, dict(held) if held else _NOTHING) for held in registries]
        self._persistence = [frozenset(module._non_persistent_buffers_set) for module in self._modules]
        self._values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters = {storage_of(parameter): parameter for parameter in model.parameters()}
        self._generators = generators()

    def watching(self) -> "ParameterWatch":
        """Return a context that saves every parameter before it is written."""
        return ParameterWatch(self)

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, attributes in zip(self._modules, self._attributes, strict=True):
            for name in vars(module).keys() - attributes.keys() - _REGISTRIES:
                del vars(module)[name]
            vars(module).update(attributes)
        for item, content in self._contents:
            item.clear()
            item.extend(content) if isinstance(item, list) else item.update(content)
        for held, named in self._registries:
            if held or named:
                held.clear()
                held.update(named)
        for persistence, module in zip(self._persistence, self._modules, strict=True):
            if module._non_persistent_buffers_set != persistence:
                module._non_persistent_buffers_set = set(persistence)
        with torch.no_grad():
            for tensor, value in (*self._values, *self._written.values()):
                if tensor.shape != value.shape:
                    tensor.data = value
                elif tensor.is_meta or not torch.equal(tensor, value):
                    tensor.data.copy_(value)
        set_generators(self._generators)

    def about_to_write(self, tensor: Tensor) -> None:
        """Save a parameter whose memory is about to be written."""
        parameter = self._parameters.get(storage_of(tensor))
        if parameter is not None and id(parameter) not in self._written:
            self._written[id(parameter)] = parameter, parameter.detach().clone()


_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
"""Attributes of a module that are not restored as attributes."""


def storage_of(tensor: Tensor) -> int:
    """Identify a tensor's memory."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


class ParameterWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a snapshot which parameters are about to be written."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.snapshot = snapshot

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports the whole of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        self.look(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the snapshot what the operation is about to write."""
        if func._schema.is_mutable:
            arguments = func._schema.arguments
            given = {**{argument.name: value for argument, value in zip(arguments, args, strict=False)}, **kwargs}
            written = [given[each.name] for each in arguments if each.is_write and each.name in given]
            for tensor in tree_leaves(written):
                if isinstance(tensor, Tensor):
                    self.snapshot.about_to_write(tensor)


@contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Put the model and the generators back when the block ends, even by an error."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()
