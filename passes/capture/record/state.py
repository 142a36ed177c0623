"""What a run of the model changes: saved before the run, put back after it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import filterfalse
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnifx.passes.capture.model_state import Missing, Read
from dnifx.passes.capture.record.changes import GONE, OWN, Pair, changes
from dnifx.passes.capture.record.contents import ATOMS, ATTRIBUTES, Held, fixed_parts, held_by, identical, is_open
from dnifx.passes.capture.record.generators import generators, set_generators

_REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_HOOKS = tuple(name for name in _REGISTRIES if name.endswith("hooks"))
_OF_TORCH = (Tensor, nn.Parameter, nn.Buffer)


class TensorState(NamedTuple):
    """What is saved of a tensor that a model holds: everything but its values.

    Attributes:
        tensor: The tensor.
        alias: Another tensor on the same memory.
        address: Where the memory is.
        needs_grad: Whether it requires gradient.
        grad: Its gradient.
        hooks: Its hooks on gradients.
        grad_hooks: Its hooks on gradients that were accumulated.
        attributes: What Python code keeps on it.
    """

    tensor: Tensor
    alias: Tensor
    address: int
    needs_grad: bool
    grad: Tensor | None
    hooks: Any
    grad_hooks: Any
    attributes: dict[str, Any]

    @classmethod
    def of(cls, tensor: Any) -> "TensorState":
        """Save a tensor's state."""
        grad, alias = tensor.grad if tensor.is_leaf else None, tensor.detach()
        hooks, grad_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
        attributes = dict(vars(tensor))
        return cls(tensor, alias, _address(tensor), tensor.requires_grad, grad, hooks, grad_hooks, attributes)

    def restore(self) -> None:
        """Put the state back."""
        tensor: Any = self.tensor
        needs_grad = tensor.requires_grad
        if needs_grad and not self.needs_grad and not tensor.is_leaf and not tensor._is_view():
            tensor.detach_()
        if tensor.shape != self.alias.shape or (self.address and tensor.data_ptr() != self.address):
            tensor.data = self.alias
        if self.attributes or vars(tensor):
            Held(tensor, ATTRIBUTES, self.attributes).put_back()
        if not tensor.is_leaf:
            return
        if needs_grad is not self.needs_grad:
            tensor.requires_grad_(self.needs_grad)
        if tensor.grad is not self.grad:
            tensor.grad = self.grad
        if tensor._backward_hooks is not self.hooks:
            (tensor._backward_hooks or {}).clear()
            tensor._backward_hooks = self.hooks
        if tensor._post_accumulate_grad_hooks is not self.grad_hooks:
            (tensor._post_accumulate_grad_hooks or {}).clear()
            tensor._post_accumulate_grad_hooks = self.grad_hooks


def _address(tensor: Tensor) -> int:
    """Return where a tensor's memory is, or 0 for a kind of tensor that does not say."""
    return tensor.data_ptr() if type(tensor) in _OF_TORCH and tensor.layout is torch.strided else 0


def _write_back(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor its values again."""
    if tensor.layout is not torch.strided:
        tensor.data = value.clone()
    elif not tensor.is_meta and not torch.equal(tensor, value):
        memory = tuple(slice(None if step else 1) for step in tensor.stride())  # each place of an expanded tensor once
        tensor.data[memory].copy_(value[memory])


class Snapshot:
    """A model with all that it holds, and the states of all generators, as they were.

    What the model holds is found through attributes, containers, objects, classes of modules, and the variables that hooks
    enclose. It is put back in place: no object is exchanged for another. The values of buffers are copied at once; those of
    other tensors are copied when a ``ParameterWatch`` sees that they are about to be written.

    Args:
        model: The model.
        outside: Variables outside of the model that its functions name.
    """

    def __init__(self, model: nn.Module, outside: Iterable[Read] = ()) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._held: dict[int, tuple[Held, ...]] = {}
        self._empty: list[Any] = []
        self._deep: set[int] = set()
        self._classes: dict[type, tuple[nn.Module, dict[str, Any]]] = {}
        self._tensors: dict[int, TensorState] = {}
        self._registered: set[int] = set()
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._outside: dict[tuple[int, str], tuple[Read, Any]] = {}
        self._versions: dict[int, int] = {}
        self._plain: list[Tensor] = []
        self.reach(model)
        for each in outside:
            self.add(each)
        self._generators = generators()

    def add(self, variable: Read) -> None:
        """Save a variable outside of the model too, unless it is saved."""
        key = id(variable.holder), variable.name
        if key not in self._outside:
            self._outside[key] = variable, variable.value
            self.reach(variable.value)

    @property
    def outside(self) -> tuple[Read, ...]:
        """The variables outside of the model that are saved."""
        return tuple(variable for variable, _ in self._outside.values())

    def reach(self, root: Any) -> None:
        """Save an object with all that it holds."""
        todo: list[Any] = [root]
        before = len(self._tensors)
        while todo:
            item = todo.pop()
            if type(item) not in ATOMS and id(item) not in self._held and id(item) not in self._tensors:
                todo += [part for part in self._save(item) if type(part) not in ATOMS]
        if len(self._tensors) == before:
            return
        self._plain = [each.tensor for identity, each in self._tensors.items() if identity not in self._registered]
        self._versions = self._versions_now() | self._versions
        self.__dict__.pop("_memories", None)

    def _save(self, item: Any) -> Iterable[Any]:
        """Save what an object holds; return its parts."""
        if isinstance(item, Tensor):
            return self._save_tensor(item)
        if isinstance(item, nn.Module):
            return self._save_module(item)
        self._held[id(item)] = held = held_by(item)
        return [part for each in held for part in each.parts()] if held else fixed_parts(item) or ()

    def _save_tensor(self, tensor: Tensor) -> Iterable[Any]:
        if nn.parameter.is_lazy(tensor):
            return ()
        self._tensors[id(tensor)] = state = TensorState.of(tensor)
        return *state.attributes.values(), *filter(None, (state.hooks, state.grad_hooks))

    def _save_module(self, module: nn.Module) -> Iterable[Any]:
        content = dict(vars(module))
        self._held[id(module)] = (Held(module, ATTRIBUTES, content),)
        parts = [value for name, value in content.items() if name not in OWN and type(value) not in ATOMS]
        if parts:
            self._deep.add(id(module))
        if type(module) not in self._classes:
            parts += self._save_classes(module)
        registries = [*map(content.get, _REGISTRIES)]
        self._empty += filterfalse(None, registries)
        for registry in filter(None, registries):
            parts += [registry] if isinstance(registry, dict | set) else registry.values()
        parameters, buffers = content.get("_parameters"), content.get("_buffers")
        if parameters:
            self._registered.update(map(id, parameters.values()))
        if buffers:
            self._registered.update(map(id, buffers.values()))
            missing = [each for each in buffers.values() if each is not None and id(each) not in self._buffers]
            self._buffers.update((id(buffer), (buffer, buffer.detach().clone())) for buffer in missing)
        return parts

    def _save_classes(self, module: nn.Module) -> list[Any]:
        """Save the attributes of a module's class and of the classes that it is derived from; return their values."""
        parts = []
        for kind in type(module).__mro__:
            if kind not in self._classes and is_open(kind):
                self._classes[kind] = module, _class_attributes(kind)
                parts += [value for value in self._classes[kind][1].values() if not _is_descriptor(value)]
        return parts

    def _versions_now(self) -> dict[int, int]:
        """Return how many writes torch counted to each tensor that is neither a parameter nor a buffer."""
        return {id(tensor): tensor._version for tensor in self._plain if not tensor.is_inference()}

    @cached_property
    def _memories(self) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """The tensors on each piece of memory, each with an alias that stays there."""
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for state in self._tensors.values():
            place = state.tensor if state.tensor.layout is not torch.strided else state.alias
            found.setdefault(storage_of(place), []).append((state.tensor, state.alias))
            if state.grad is not None:
                found.setdefault(storage_of(state.grad), []).append((state.grad, state.grad))
        return found

    def watching(self) -> "ParameterWatch":
        """Return a context that saves the values of every tensor before they are written."""
        return ParameterWatch(self)

    def about_to_write(self, tensor: Tensor) -> None:
        """Save the values of all tensors on the memory that is about to be written."""
        for each, alias in self._memories.get(storage_of(tensor), ()):
            if id(each) not in self._written and id(each) not in self._buffers:
                self._written[id(each)] = each, alias.detach().clone()

    def save_plain(self) -> None:
        """Save the values of all tensors that are neither parameters nor buffers."""
        for tensor in self._plain:
            self.about_to_write(tensor)

    def restore(self) -> None:
        """Put everything back as it was."""
        for held in self._held.values():
            for each in held:
                each.put_back()
        for registry in filter(None, self._empty):
            registry.clear()
        for kind, (_, before) in self._classes.items():
            now = _class_attributes(kind)
            for name in now.keys() - before.keys():
                type.__delattr__(kind, name)
            for name in [name for name, value in before.items() if name not in now or now[name] is not value]:
                type.__setattr__(kind, name, before[name])
        with torch.no_grad():
            for state in self._tensors.values():
                state.restore()
            for tensor, value in (*self._buffers.values(), *self._written.values()):
                _write_back(tensor, value)
        self._written.clear()
        for variable, value in self._outside.values():
            if value is Missing and variable.value is not Missing:
                delattr(variable.holder, variable.name)
            elif variable.value is not value:
                setattr(variable.holder, variable.name, value)
        self._versions = self._versions_now()
        set_generators(self._generators)

    def changes(self) -> dict[tuple[Any, str], str]:
        """Return the attributes, and variables outside of the model, that now are or hold something else, with their dotted names.

        Equal values count as unchanged. A tensor is changed where it is another object or was written. An object that several
        attributes hold is named once. Parameters, buffers, hooks, modes and torch's generators are left out.
        """
        return changes(self._attributes(), self._held, self._paths.keys(), self._was_written)

    def held(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether an attribute held this very object, which may have been written since."""
        saved = self._held.get(id(module), ())
        return any(each.access is ATTRIBUTES and dict(each.content).get(name, GONE) is value for each in saved)

    def written_of(self, parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Return those parameters, with their paths, that were written since they were saved."""
        return [(path, each) for path, each in parameters.items() if id(each) in self._written]

    def new_hooks(self) -> list[str]:
        """Return the dotted names of the modules that have hooks now which they did not have."""
        return [path for identity, path in self._paths.items() if self._has_new_hooks(self._held[identity][0].item)]

    def _has_new_hooks(self, module: nn.Module) -> bool:
        for registry in filter(None, map(vars(module).get, _HOOKS)):
            held = self._held.get(id(registry))
            if not held or not identical(held[0].content, registry):
                return True
        return False

    def _attributes(self) -> Iterator[Pair]:
        """Yield the attributes of modules and of their classes that may have changed."""
        for kind, (module, before) in self._classes.items():
            now = _class_attributes(kind)
            same = {name for name, value in before.items() if now.get(name) is value and _is_descriptor(value)}
            yield from self._pairs(module, before, now, same)
        for identity in self._paths:
            held = self._held[identity][0]
            now = vars(held.item)
            if identity in self._deep or not identical(held.content, now):
                yield from self._pairs(held.item, dict(held.content), now, OWN)
        for variable, value in self._outside.values():
            yield Pair(value, variable.value, variable.holder, variable.name, variable.path)

    def _pairs(
        self, module: nn.Module, before: dict[str, Any], now: dict[str, Any], ignored: Collection[str]
    ) -> Iterator[Pair]:
        path = self._paths.get(id(module), "")
        for name in {**before, **now}:
            if name not in ignored:
                text = f"{path}.{name}" if path else name
                yield Pair(before.get(name, GONE), now.get(name, GONE), module, name, text)

    def _was_written(self, tensor: Tensor) -> bool:
        if id(tensor) in self._registered:
            return False
        return id(tensor) in self._written or self._versions.get(id(tensor)) != (
            None if tensor.is_inference() else tensor._version
        )


def _class_attributes(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if name[:2] != "__"}


def _is_descriptor(value: Any) -> bool:
    return hasattr(type(value), "__get__")


def storage_of(tensor: Tensor) -> int:
    """Identify a tensor's memory."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


class ParameterWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a snapshot which tensors are about to be written."""

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
        if func._schema.is_mutable:
            self.look(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the snapshot what an operation, one that writes, is about to write."""
        arguments = func._schema.arguments
        given = {**{argument.name: value for argument, value in zip(arguments, args, strict=False)}, **kwargs}
        written = [given[each.name] for each in arguments if each.is_write and each.name in given]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor):
                self.snapshot.about_to_write(tensor)


@contextmanager
def preserved(model: nn.Module, outside: Iterable[Read] = ()) -> Iterator[Snapshot]:
    """Put the model, the generators, and these variables back when the block ends, even by an error; see ``outside.restored``."""
    snapshot = Snapshot(model, outside)
    try:
        yield snapshot
    finally:
        snapshot.restore()
