"""Writes the graph: nodes for calls, for sizes and for what is read from the model, and which value lives where."""

import enum
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.passes.capture.record.functions import SHAPED_LIKE_FIRST, is_random, name_of
from dnifx.passes.capture.record.node_values import STEPS, Origin, Path
from dnifx.passes.capture.record.sizes import Expression, Number, Owner, SymbolicFloat, SymbolicInt, plain_number
from dnifx.passes.capture.record.structure import variables_in
from dnifx.runtime.emitted import ops
from dnifx.runtime.emitted.checkpoints import CHECKPOINT, Region, regions_of

Stack = OrderedDict[str, tuple[str, type[nn.Module]]]
"""The modules that a node lies in, outermost first, as torch.fx's tracer writes them."""

_LITERALS = (torch.dtype, torch.device, torch.memory_format, torch.layout, type(None), type(Ellipsis), range, enum.Enum)
_NUMBERS = (bool, int, float, complex, str)
_LONGEST_LITERAL = 64


class Writer:
    """A graph on its way, and the values that its nodes stand for.

    Args:
        model: The model whose parameters and buffers the graph reads.
        owner: The recorder whose numbers the graph can compute.
        unknown: Called with a tensor of unknown origin; returns the object to keep as a constant in its place.
    """

    def __init__(self, model: nn.Module, owner: Owner, unknown: Callable[[Tensor], Tensor]) -> None:
        self.graph = fx.Graph()
        self.stack: Stack = OrderedDict()
        self.call = 0
        self.checkpoints: tuple[Region, ...] = ()
        self.constants: dict[str, object] = {}
        self.tainted: set[fx.Node] = set()
        self.ragged: set[fx.Node] = set()
        self.owned: dict[int, str] = {}
        named = (*model.named_parameters(), *model.named_buffers())
        for path, tensor in named:
            self.owned.setdefault(id(tensor), path)
        self.parameters = {path for path, _ in model.named_parameters()}
        self._owner = owner
        self._unknown = unknown
        self._origins: dict[int, Origin] = {}
        self._constant_names: dict[int, str] = {}
        self._devices: dict[int, Tensor] = {}
        self._alive: list[Any] = [tensor for _, tensor in named]
        self._last_placeholder: fx.Node | None = None

    def placeholder(self, name: str, tensor: Tensor) -> str:
        """Add an input and return its name."""
        node = self.graph.placeholder(name)
        node.target = node.name
        node.meta["nn_module_stack"] = OrderedDict()
        self._last_placeholder = node
        self.place(tensor, Origin(node))
        return node.name

    @contextmanager
    def checkpointed(self, region: Region) -> Iterator[None]:
        """Let the nodes that are added within the block lie in a region."""
        outer, self.checkpoints = self.checkpoints, (*self.checkpoints, region)
        try:
            yield
        finally:
            self.checkpoints = outer

    def add(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """Add a node at the end."""
        node = self.graph.create_node(op, target, args, dict(kwargs or {}), name)
        node.meta["nn_module_stack"] = self.stack
        if self.call:
            node.meta["call"] = self.call
        if self.checkpoints:
            node.meta[CHECKPOINT] = self.checkpoints
        self._taint(node, name or name_of(target))
        return node

    def add_after(self, function: Callable[..., Any] | str, args: tuple[Any, ...], name: str | None = None) -> fx.Node:
        """Add a call as early as its arguments allow: then a number crosses a cut, and not the tensor it is read from."""
        last = max(node for node in args if isinstance(node, fx.Node))
        place = self._last_placeholder if last.op == "placeholder" else last
        if last.next.target is ops.guard_length:
            place = last.next  # before an item is asked for that is not there
        kind = "call_method" if isinstance(function, str) else "call_function"
        with self.graph.inserting_after(place or last):
            node = self.graph.create_node(kind, function, args, {}, name)
        node.meta.update(last.meta)
        node.meta.pop("val_spec", None)
        self._taint(node, name_of(function))
        return node

    def _taint(self, node: fx.Node, name: str) -> None:
        """Note whether a node depends on more than the inputs, and whether its shape depends on values."""
        inputs = node.all_input_nodes
        if name in ("size", "stride") or (node.target is getattr and node.args[1] == "device"):
            inputs = [source for source in inputs if source in self.ragged]
        own = node.op == "call_module" or (node.op == "get_attr" and node.target in self.parameters)
        opaque = node.target in (ops.call, ops.apply_function, ops.vmapped)
        if own or opaque or is_random(name) or any(source in self.tainted for source in inputs):
            self.tainted.add(node)
        sources = inputs[:1] if name in SHAPED_LIKE_FIRST else inputs
        if node.op != "call_module" and any(source in self.ragged for source in sources):
            self.ragged.add(node)

    def place(self, tensor: Tensor, origin: Origin) -> None:
        """Remember that ``tensor`` lives at ``origin`` from now on."""
        self._origins[id(tensor)] = origin
        self._alive.append(tensor)

    def keep(self, thing: Any) -> None:
        """Keep a thing alive, so that its identity stays its own."""
        self._alive.append(thing)

    def origin(self, tensor: Tensor) -> Origin | None:
        """Return where a tensor lives, or None where the graph did not make it."""
        return self._origins.get(id(tensor))

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor is made by the graph or is a parameter or buffer of the model."""
        return id(tensor) in self._origins or id(tensor) in self.owned

    def node_at(self, origin: Origin) -> fx.Node:
        """Return the node of an origin, taking a part out of its base's value where needed."""
        if origin.node is None:
            node = origin.base
            for kind, key in origin.path:
                step: Any = STEPS[kind]
                node = self.add_after(step, (node, key))
            origin.node = node
        return origin.node

    def tensor(self, tensor: Tensor) -> fx.Node:
        """Return a node whose value is the tensor."""
        origin, path = self._origins.get(id(tensor)), self.owned.get(id(tensor))
        anew = path is not None and bool(self.checkpoints)  # a region reads a buffer each time that it is computed
        if origin is not None and not (anew and regions_of(origin.base) != self.checkpoints):
            return self.node_at(origin)
        if path is not None:
            return self.add("get_attr", path, name=path.replace(".", "_"))
        return self.constant(self._unknown(tensor), tensor)

    def constant(self, thing: Any, source: Any = None) -> fx.Node:
        """Return a node that reads a constant, made of ``source`` or of the thing itself."""
        identity = id(thing if source is None else source)
        if identity not in self._constant_names:
            name = f"_constant{len(self.constants)}"
            self._constant_names[identity] = name
            self.constants[name] = thing
            self._alive += [thing, source]
        return self.add("get_attr", self._constant_names[identity])

    def constant_identities(self) -> Collection[int]:
        """Return the identities of the objects that constants were made of."""
        return self._constant_names.keys()

    def number(self, number: Number) -> Any:
        """Return the node that computes a symbolic number, or its plain value where nothing in the graph makes it."""
        expression: Expression = number.expression
        if expression.owner is not self._owner:
            return plain_number(number)
        if expression.node is None:
            expression.node = self._number_node(expression)
        return plain_number(number) if expression.node is None else expression.node

    def _number_node(self, expression: Expression) -> fx.Node | None:
        if expression.function is None:
            origin, dimension, method = expression.operands
            source = self.node_at(origin)
            return source if dimension is None else self.add_after(method, (source, dimension))
        operands = tuple(self.operand(item) for item in expression.operands)
        if not any(isinstance(item, fx.Node) for item in operands):
            return None
        return self.add_after(expression.function, operands)

    def operand(self, item: Any) -> Any:
        """Return a symbolic number's node, and anything else unchanged."""
        return self.number(item) if isinstance(item, SymbolicInt | SymbolicFloat) else item

    def remember_device(self, device: torch.device, tensor: Tensor) -> None:
        """Remember which tensor a device was read from, so that the graph follows the model to another one."""
        self._devices[id(device)] = tensor
        self._alive.append(device)

    def argument(self, item: Any) -> Any:
        """Return what stands for a value among a node's arguments: a node, a literal, or a container of these."""
        if isinstance(item, Tensor):
            return self.tensor(item)
        if isinstance(item, SymbolicInt | SymbolicFloat):
            return self.number(item)
        if isinstance(item, torch.device) and id(item) in self._devices:
            return self._device(self._devices[id(item)])
        if isinstance(item, _LITERALS):
            return item
        if isinstance(item, _NUMBERS):
            return item if type(item) in _NUMBERS else _base_value(item)
        if isinstance(item, torch.Size):
            return tuple(self.argument(part) for part in item)
        if type(item) in (list, tuple):
            return type(item)(self.argument(part) for part in item)
        if isinstance(item, slice):
            return slice(self.argument(item.start), self.argument(item.stop), self.argument(item.step))
        if type(item) is dict and all(isinstance(key, str) for key in item):
            return {key: self.argument(value) for key, value in item.items()}
        return self.object(item)

    def _device(self, tensor: Tensor) -> fx.Node:
        source = self.tensor(tensor)
        found = next((user for user in source.users if user.target is getattr and user.args[1] == "device"), None)
        return found or self.add_after(getattr, (source, "device"))

    def object(self, item: Any) -> fx.Node:
        """Return a node for an object of any class: a constant, or rebuilt around the graph's values that it holds."""
        variables = variables_in(item)
        nodes = [self.argument(part) for part in variables]
        kept = [(part, node) for part, node in zip(variables, nodes, strict=True) if isinstance(node, fx.Node)]
        if not kept:
            return self.constant(item)
        template = ops.Template(item, [part for part, _ in kept])
        return self.add("call_function", ops.rebuild, (self.constant(template), *(node for _, node in kept)))

    def literal(self, value: Any) -> Any:
        """Return a plain value as it stands among arguments; a long list becomes a constant."""
        flat = isinstance(value, bool | int | float | str | type(None))
        return value if flat or len(repr(value)) <= _LONGEST_LITERAL else self.constant(value)

    def bind(self, value: Any, node: fx.Node, path: Path = (), depth: int = 0) -> None:
        """Remember that the tensors in a value are made by ``node``."""
        if isinstance(value, Tensor):
            known = self._origins.get(id(value))
            if known is None or known.base is not node or len(known.path) > len(path):
                self.place(value, Origin(node, path))
        elif isinstance(value, list | tuple):
            for index, part in enumerate(value):
                self.bind(part, node, (*path, ("item", index)), depth + 1)
        elif isinstance(value, Mapping):
            for key in value:
                self.bind(value[key], node, (*path, ("item", key)), depth + 1)
        elif depth < _DEEPEST and not isinstance(value, nn.Module | type):
            for name, part in getattr(value, "__dict__", {}).items():
                self.bind(part, node, (*path, ("attribute", name)), depth + 1)


_DEEPEST = 5


def _base_value(item: Any) -> Any:
    """Return a number or text of a class of the user's as one of Python's own."""
    kind: Any = next(kind for kind in _NUMBERS if isinstance(item, kind))
    return kind(item)
