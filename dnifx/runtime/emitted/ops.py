"""What captured graphs call beside torch's own functions. Imports torch alone, so emitted packages can carry a copy."""

import copy
import importlib
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, Sequence, ValuesView
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Autocast = tuple[str, torch.dtype | None, bool]
"""An autocast region: device type, dtype, enabled."""


class GuardError(RuntimeError):
    """The captured graph does not hold for this input: the model's Python would now read another value."""


def guard(value: Any, expected: Any, where: str = "") -> None:
    """Raise GuardError if ``value`` (a tensor's content, or a number) is not ``expected``, as it was at capture."""
    got = value.tolist() if isinstance(value, Tensor) else value
    if expected is True or expected is False:
        got = True if got else False  # noqa: SIM210 - while torch.compile looks on, a comparison of sizes is no bool before it decides
    if got != expected and not (got != got and expected != expected):  # NaN is NaN here
        raise GuardError(
            f"{where or 'a guard'}: the model's Python saw {expected!r} when it was captured and now sees {got!r}"
        )


def guard_length(values: Sequence[Any], expected: int, where: str = "") -> None:
    """Raise GuardError if a split returns another number of pieces than its loop was captured with."""
    if len(values) != expected:
        raise GuardError(f"{where or 'a guard'}: captured with {expected} pieces, got {len(values)}")


def set_item(target: Any, index: Any, value: Any) -> Any:
    """Do ``target[index] = value`` and return ``target``, so the graph shows the write."""
    target[index] = value
    return target


def set_attribute(target: Any, name: str, value: Any) -> Any:
    """Do ``target.name = value`` and return ``target``."""
    setattr(target, name, value)
    return target


def held(module: nn.Module, *path: str) -> Any:
    """Return what a module holds at a path, whatever else it has under these names."""
    found: Any = module
    for name in path:
        registries = (vars(found).get(each, {}) for each in ("_parameters", "_buffers", "_modules"))
        registry = next((each for each in registries if name in each), None)
        found = getattr(found, name) if registry is None else registry[name]
    return found


def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function that has no importable name."""
    return function(*args, **kwargs)


def call_anew(function: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a function that gives another value in each call, or matters by what it does; a dotted name imports its module."""
    if isinstance(function, str):
        module, _, name = function.rpartition(".")
        function = getattr(importlib.import_module(module), name)
    return function(*args, **kwargs)  # type: ignore[operator]


def apply_function(function: type[torch.autograd.Function], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``function.apply``."""
    return function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]


def vmapped(function: Callable[..., Any], options: tuple[Any, ...], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``torch.vmap(function)`` with ``options`` (in_dims, out_dims, randomness, chunk_size)."""
    in_dims, out_dims, randomness, chunk_size = options
    return torch.vmap(function, in_dims, out_dims, randomness, chunk_size=chunk_size)(*args, **kwargs)


def reading(reads: tuple[Any, ...], target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``target``, which also reads the modules and parameters in ``reads``, by itself."""
    return target(*args, **kwargs)


def under(grad: bool, autocast: Autocast | None, target: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call ``target`` in the grad mode and the autocast region that the model had set around it.

    Args:
        grad: Whether autograd records.
        autocast: The innermost autocast region, or None.
        target: A function, its dotted name under ``torch`` or ``operator``, or a tensor method written ``".name"``.
        args: Its positional arguments; the tensor itself first, for a method.
        kwargs: Its keyword arguments.
    """
    region = nullcontext() if autocast is None else torch.autocast(autocast[0], dtype=autocast[1], enabled=autocast[2])
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()), region:
        if not isinstance(target, str):
            return target(*args, **kwargs)
        if target.startswith("."):
            return getattr(args[0], target[1:])(*args[1:], **kwargs)
        return resolve(target)(*args, **kwargs)


def resolve(name: str) -> Callable[..., Any]:
    """Return the function with a dotted name that begins with ``torch``, ``operator`` or ``builtins``."""
    root, *path = name.split(".")
    found: Any = {"torch": torch, "operator": operator, "_operator": operator, "builtins": __builtins__}[root]
    for part in path:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found  # type: ignore[no-any-return]


def rebuild(template: "Template", *values: Any) -> Any:
    """Return the object that ``template`` was made from, with ``values`` in place of its tensors."""
    return template.build(values)


@dataclass(frozen=True)
class Slot:
    """The place of a value in a template."""

    index: int


@dataclass(frozen=True)
class _Made:
    """A call that makes an object from filled parts."""

    make: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class _Shell:
    """An object of any class, copied around the values; stand-ins mark the places of values and of sizes that hold values."""

    content: Any
    standins: tuple[tuple[Any, Tensor], ...]
    shared: tuple[Any, ...]


class Template:
    """An object with values cut out. It builds the same object around other values.

    Tuples, lists, dicts, named tuples, dataclasses, functions with closures and objects of any class are rebuilt in their
    own type. Parts that hold none of the values are shared, not copied.

    Args:
        content: The object.
        values: The values in it (by identity) that change from call to call.
    """

    def __init__(self, content: Any, values: Sequence[Any]) -> None:
        self.size = len(values)
        self.tree = _cut(content, {id(value): Slot(index) for index, value in reversed(list(enumerate(values)))})

    def build(self, values: Sequence[Any]) -> Any:
        """Return the object around ``values``."""
        return _fill(self.tree, values)


def children(item: Any) -> tuple[tuple[Any, Any], ...] | None:
    """Return the (key, value) parts that an object holds, or None if it counts as one thing."""
    if isinstance(item, _ATOMS):
        return None
    if isinstance(item, dict):
        return tuple(item.items())
    if isinstance(item, tuple | list | set | frozenset | deque):
        return tuple(enumerate(item))
    if isinstance(item, partial):
        return ("func", item.func), ("args", item.args), ("keywords", item.keywords)
    if isinstance(item, types.FunctionType):
        return tuple((f"cell{index}", _content(cell)) for index, cell in enumerate(item.__closure__ or ()))
    if isinstance(item, types.MethodType):
        return (("__self__", item.__self__), ("__func__", item.__func__))
    if isinstance(item, STREAMS):
        return None
    declared = [kind.__dict__.get("__slots__", ()) for kind in type(item).__mro__]
    slots = [name for names in declared for name in ((names,) if isinstance(names, str) else names)]
    named = [(name, getattr(item, name, None)) for name in slots if name not in ("__dict__", "__weakref__")]
    return (*named, *getattr(item, "__dict__", {}).items())


STREAMS = (Iterator, KeysView, ValuesView, ItemsView)
"""What is used up by reading it, or shows what something else holds: its parts are not known before."""

_ATOMS = (
    *(Tensor, nn.Module, type, types.ModuleType, types.BuiltinFunctionType),
    *(str, bytes, int, float, complex, type(None), slice, range),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator),
)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _holds(item: Any, slots: dict[int, Slot], seen: set[int]) -> bool:
    if id(item) in slots:
        return True
    if id(item) in seen:
        return False
    seen.add(id(item))
    if isinstance(item, torch.Size):
        return any(id(part) in slots for part in item)
    return any(_holds(value, slots, seen) for _, value in children(item) or ())


def _cut(item: Any, slots: dict[int, Slot]) -> Any:
    if id(item) in slots:
        return slots[id(item)]
    if not _holds(item, slots, set()):
        return item
    kind = type(item)
    if kind in (tuple, list, torch.Size):
        return _Made(_collected, (kind, *(_cut(part, slots) for part in item)))
    if kind in (dict, OrderedDict):
        pairs = (_Made(_collected, (tuple, key, _cut(value, slots))) for key, value in item.items())
        return _Made(_collected, (kind, *pairs))
    if isinstance(item, tuple) and len(getattr(item, "_fields", ())) == len(item):
        return _Made(kind, tuple(_cut(part, slots) for part in item))
    if kind is deque:
        return _Made(deque, (_Made(_collected, (list, *(_cut(part, slots) for part in item))), item.maxlen))
    if kind is partial:
        named = tuple((key, _cut(value, slots)) for key, value in item.keywords.items())
        return _Made(partial, (_cut(item.func, slots), *(_cut(part, slots) for part in item.args)), named)
    if is_dataclass(item) and _is_plain(item):
        return _Made(kind, (), tuple((part.name, _cut(getattr(item, part.name), slots)) for part in fields(item)))
    if isinstance(item, types.FunctionType):
        return _Made(_function, (item, *(_cut(_content(cell), slots) for cell in item.__closure__ or ())))
    if isinstance(item, types.MethodType):
        return _Made(types.MethodType, (item.__func__, _cut(item.__self__, slots)))
    return _shell(item, slots)


def _is_plain(item: Any) -> bool:
    """Whether a dataclass is made whole again by calling its class with its fields."""
    kind, parts = type(item), fields(item)
    initialised = next(base for base in kind.__mro__ if "__init__" in base.__dict__)
    generated = "__dataclass_params__" in initialised.__dict__ and all(part.init for part in parts)
    settled = isinstance(item, dict) or "__post_init__" not in dir(kind)
    return generated and settled and set(vars(item)) <= {part.name for part in parts}


def _shell(item: Any, slots: dict[int, Slot]) -> _Shell:
    sizes = {id(part): _cut(part, slots) for part in _found(item, torch.Size, set()) if _holds(part, slots, set())}
    standins = {identity: (tree, torch.empty(0)) for identity, tree in {**slots, **sizes}.items()}
    shared = tuple(_found(item, nn.Module | nn.Parameter, set()))
    memo: dict[int, Any] = {id(part): part for part in shared}
    memo.update({identity: standin for identity, (_, standin) in standins.items()})
    return _Shell(copy.deepcopy(item, memo), tuple(standins.values()), shared)


def _found(item: Any, kinds: Any, seen: set[int]) -> list[Any]:
    """Return the parts of an object that are of some classes, without what these hold."""
    if id(item) in seen:
        return []
    seen.add(id(item))
    if isinstance(item, kinds):
        return [item]
    return [found for _, value in children(item) or () for found in _found(value, kinds, seen)]


def _fill(tree: Any, values: Sequence[Any]) -> Any:
    if isinstance(tree, Slot):
        return values[tree.index]
    if isinstance(tree, _Made):
        return tree.make(
            *[_fill(part, values) for part in tree.args], **{key: _fill(part, values) for key, part in tree.kwargs}
        )
    if isinstance(tree, _Shell):
        memo: dict[int, Any] = {id(part): part for part in tree.shared}
        memo.update({id(standin): _fill(part, values) for part, standin in tree.standins})
        return copy.deepcopy(tree.content, memo)
    return tree


def _collected(kind: type, *parts: Any) -> Any:
    return kind(parts)


def _function(function: types.FunctionType, *cells: Any) -> types.FunctionType:
    contents = tuple(map(types.CellType, cells))
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, contents
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def detached(value: Any) -> Any:
    """Detach every tensor in a value, as an operation inside ``torch.no_grad()`` does."""
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def differentiating(function: Any, *inputs: Any) -> Any:
    """Call a function that differentiates inside; under ``torch.no_grad()`` its result keeps no graph."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        values = function(*inputs)
    return values if wanted else detached(values)
