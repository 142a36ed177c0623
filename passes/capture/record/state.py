"""What a run of the model changes: taken down before, put back after."""

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


def finish_draws(after: Generators) -> None:
    """Put Python's and NumPy's generators where a recorded run left them, since its graph does not draw from them."""
    random.setstate(after[2])
    np.random.set_state(after[3])


def python_draws() -> tuple[Any, ...]:
    """Return a mark that changes whenever Python or NumPy draws a random number."""
    _, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return words[-1], words[:2], gauss, numpy_state["state"]["pos"], numpy_state["state"]["key"][:2].tobytes()


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Snapshot:
    """A model's parameters, buffers, attributes and training flags, and the states of all generators."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._attributes = [_attributes(module) for module in self._modules]
        self._contents = [
            (item, _copy(item)) for held in self._attributes for item in held.values() if type(item) in _FILLED
        ]
        registries = [held for module in self._modules for held in (module._parameters, module._buffers)]
        self._registries: list[tuple[Any, Any]] = [(held, dict(held) if held else _NOTHING) for held in registries]
        self._persistence = [frozenset(module._non_persistent_buffers_set) for module in self._modules]
        self._values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters = {_storage(parameter): parameter for parameter in model.parameters()}
        self._generators = generators()

    def watching(self) -> "ParameterWatch":
        """Return a context that keeps the value of every parameter that is written within it."""
        return ParameterWatch(self)

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, attributes in zip(self._modules, self._attributes, strict=True):
            _restore_attributes(module, attributes)
        for item, content in self._contents:
            _refill(item, content)
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
        """Keep the value of a parameter whose memory is about to be written."""
        parameter = self._parameters.get(_storage(tensor))
        if parameter is not None and id(parameter) not in self._written:
            self._written[id(parameter)] = parameter, parameter.detach().clone()


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _HELD}


_HELD = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _restore_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    held = vars(module)
    for name in [name for name in held if name not in attributes and name not in _HELD]:
        del held[name]
    held.update(attributes)


_FILLED = (dict, list, set)


def _copy(item: Any) -> Any:
    return type(item)(item)


def _refill(item: Any, content: Any) -> None:
    """Give a container of the model back what it held."""
    if isinstance(item, list):
        item[:] = content
    else:
        item.clear()
        item.update(content)


def _storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


class ParameterWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a snapshot of every parameter that an operation is about to write."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.snapshot = snapshot

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports the whole of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation."""
        self.look(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the snapshot what the operation is about to write."""
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write:
                    self._tell(value)
            for argument in func._schema.arguments:
                if argument.is_write and argument.name in kwargs:
                    self._tell(kwargs[argument.name])

    def _tell(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.snapshot.about_to_write(tensor)


@contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Put the model and the generators back as they were when the block ends, however it ends."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    finally:
        snapshot.restore()
