"""Writes the graph: nodes for calls, for sizes and for reads of the model, and which node made which value."""

import enum
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.ir import constants_root
from dnifx.passes.capture.record.arrays import FollowedArray
from dnifx.passes.capture.record.functions import SHAPED_LIKE_FIRST, is_random, name_of
from dnifx.passes.capture.record.node_values import STEPS, NodeValue, Path
from dnifx.passes.capture.record.sizes import Expression, Number, Owner, SymbolicFloat, SymbolicInt, plain_number
from dnifx.passes.capture.record.structure import tensors_in, variables_in
from dnifx.runtime.emitted import ops
from dnifx.runtime.emitted.checkpoints import CHECKPOINT, Region, regions_of
from dnifx.runtime.emitted.source import reserve_names

Stack = OrderedDict[str, tuple[str, type[nn.Module]]]
"""The modules that a node lies in, outermost first, as torch.fx's tracer writes them."""

_LITERALS = (torch.dtype, torch.device, torch.memory_format, torch.layout, type(None), type(Ellipsis), range, enum.Enum)
_NUMBERS = (bool, int, float, complex, str)
_LONGEST_LITERAL = 64
_DEEPEST = 5
"""How deep the objects that a node makes are looked into."""


class Writer:
    """A graph that is being written, and the tensors and numbers that its nodes make.

    Args:
        model: The model whose parameters and buffers the graph reads.
        owner: The recorder whose numbers the graph can compute.
        unknown: Called with a tensor that the graph did not make; returns the constant to read in its place.
        varying: The attributes that change from call to call, as ``self.gate.table``.

    Attributes:
        stack: The modules around new nodes.
        call: How many calls of the innermost module came before.
        checkpoints: The checkpointed regions around new nodes, outermost first.
        tainted: Nodes that depend on more than the inputs: on parameters, random numbers, or functions that are not recorded.
        drawn: Nodes that depend on what another call draws anew, with the name of the function that drew.
        ragged: Nodes whose shape depends on the values of tensors.
        owned: The path of each parameter and buffer, by its identity.
    """

    def __init__(
        self, model: nn.Module, owner: Owner, unknown: Callable[[Tensor], Tensor], varying: Collection[str] = ()
    ) -> None:
        self.graph = fx.Graph()
        reserve_names(self.graph)
        self.stack: Stack = OrderedDict()
        self.call = 0
        self.checkpoints: tuple[Region, ...] = ()
        self.constants: dict[str, object] = {}
        self.tainted: set[fx.Node] = set()
        self.drawn: dict[fx.Node, str] = {}
        self.ragged: set[fx.Node] = set()
        self.owned: dict[int, str] = {}
        named = (*model.named_parameters(), *model.named_buffers())
        for path, tensor in named:
            self.owned.setdefault(id(tensor), path)
        self.parameters = {path for path, _ in model.named_parameters()}
        self._modules = {id(module): path for path, module in model.named_modules() if path}
        self._owner = owner
        self._unknown = unknown
        self._replaced = {path.removeprefix("self.") for path in varying}
        self._values: dict[int, tuple[weakref.ref[Any], NodeValue]] = {}
        self._root = constants_root(model)
        self._constant_paths: dict[int, str] = {}
        self._devices: dict[int, Tensor] = {}
        self._alive: list[Any] = [tensor for _, tensor in named]
        self._last_placeholder: fx.Node | None = None

    def placeholder(self, name: str) -> fx.Node:
        """Add an input behind those that there are."""
        last = self._last_placeholder
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before():
            node = self.graph.placeholder(name)
        node.target = node.name
        node.meta["nn_module_stack"] = OrderedDict()
        self._last_placeholder = node
        return node

    def input(self, name: str, tensor: Tensor) -> str:
        """Add an input for a tensor and return its name."""
        node = self.placeholder(name)
        self.remember(tensor, NodeValue(node))
        return node.name

    @contextmanager
    def checkpointed(self, region: Region) -> Iterator[None]:
        """Put the nodes that are added within the block into a region."""
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
        """Add a call as early as its arguments allow: then a number crosses a cut, not the tensor that it is read from."""
        last = max(node for node in args if isinstance(node, fx.Node))
        before = self._last_placeholder if last.op == "placeholder" else last
        if last.next.target is ops.guard_length:
            before = last.next  # the guard comes first, or an item that is not there would be taken
        kind = "call_method" if isinstance(function, str) else "call_function"
        with self.graph.inserting_after(before or last):
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
        opaque = node.target in (ops.call, ops.call_anew, ops.apply_function, ops.vmapped, ops.reading)
        draw = next((self.drawn[source] for source in inputs if source in self.drawn), None)
        if draw or is_random(name) or node.target is ops.call_anew:
            self.drawn[node] = draw or drawn_by(node, name)
        if own or opaque or is_random(name) or any(source in self.tainted for source in inputs):
            self.tainted.add(node)
        sources = inputs[:1] if name in SHAPED_LIKE_FIRST else inputs
        if node.op != "call_module" and any(source in self.ragged for source in sources):
            self.ragged.add(node)

    def remember(self, tensor: Tensor | FollowedArray, value: NodeValue) -> None:
        """Remember which value of the graph a tensor or an array is from now on."""
        self._values[id(tensor)] = weakref.ref(tensor), value

    def keep(self, thing: Any) -> None:
        """Keep an object alive, so that no other object gets its identity."""
        self._alive.append(thing)

    def find(self, tensor: Tensor | FollowedArray) -> NodeValue | None:
        """Return which value of the graph a tensor or an array is, or None where the graph did not make it."""
        reference, value = self._values.get(id(tensor), (None, None))
        return value if reference is not None and reference() is tensor else None

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor is made by the graph or is a parameter or buffer of the model."""
        return self.find(tensor) is not None or id(tensor) in self.owned

    def is_replaced(self, tensor: Tensor) -> bool:
        """Whether the tensor is a buffer in whose place forward puts other tensors."""
        return self.owned.get(id(tensor)) in self._replaced

    def node_of(self, value: NodeValue) -> fx.Node:
        """Return the node of a value; a part of a node's value gets a node of its own."""
        if value.node is None:
            node = value.base
            for kind, key in value.path:
                step: Any = STEPS[kind]
                node = self.add_after(step, (node, key))
            value.node = node
        return value.node

    def tensor(self, tensor: Tensor) -> fx.Node:
        """Return a node whose value is the tensor."""
        value, path = self.find(tensor), self.owned.get(id(tensor))
        read_again = path is not None and bool(self.checkpoints)  # a region reads a buffer each time it is computed
        if value is not None and not (read_again and regions_of(value.base) != self.checkpoints):
            return self.node_of(value)
        if path is not None:
            return self.add("get_attr", path, name=path.replace(".", "_"))
        return self.constant(self._unknown(tensor), tensor)

    def constant(self, thing: Any, source: Any = None) -> fx.Node:
        """Return a node that reads a constant; ``source`` is the model's object that it is read for, if it is a copy."""
        identity = id(thing if source is None else source)
        if identity not in self._constant_paths:
            path = self._constant_paths[identity] = f"{self._root}.constant{len(self.constants)}"
            self.constants[path] = thing
            self._alive += [thing, source]
        path = self._constant_paths[identity]
        return self.add("get_attr", path, name=f"_{path.rpartition('.')[2]}")

    def number(self, number: Number) -> Any:
        """Return the node that computes a symbolic number, or its plain value where no node computes it."""
        expression: Expression = number.expression
        if expression.owner is not self._owner:
            return plain_number(number)
        if expression.node is None:
            expression.node = self._number_node(expression)
        return plain_number(number) if expression.node is None else expression.node

    def _number_node(self, expression: Expression) -> fx.Node | None:
        if expression.function is None:
            value, dimension, method = expression.operands
            source = self.node_of(value)
            return source if dimension is None else self.add_after(method, (source, dimension))
        operands = tuple(self.operand(item) for item in expression.operands)
        if not any(isinstance(item, fx.Node) for item in operands):
            return None
        return self.add_after(expression.function, operands)

    def operand(self, item: Any) -> Any:
        """Return a symbolic number's node, and anything else unchanged."""
        return self.number(item) if isinstance(item, SymbolicInt | SymbolicFloat) else item

    def remember_device(self, device: torch.device, tensor: Tensor) -> None:
        """Remember which tensor a device was read from, so that the graph follows the model to another device."""
        self._devices[id(device)] = tensor
        self._alive.append(device)

    def argument(self, item: Any) -> Any:
        """Return a value in the form of a node's argument: a node, a literal, or a container of these."""
        if isinstance(item, Tensor):
            return self.tensor(item)
        if isinstance(item, SymbolicInt | SymbolicFloat):
            return self.number(item)
        if isinstance(item, FollowedArray) and self.find(item) is not None:
            return self.node_of(self._values[id(item)][1])
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
        """Return a node for an object of any class: a module of the model, a constant, or the object around the graph's values."""
        if isinstance(item, nn.Module) and id(item) in self._modules:
            return self.add("get_attr", self._modules[id(item)])
        parts = self.variables(item)
        if not parts:
            return self.constant(item)
        template = ops.Template(item, [part for part, _ in parts])
        return self.add("call_function", ops.rebuild, (self.constant(template), *(node for _, node in parts)))

    def variables(self, item: Any) -> list[tuple[Any, fx.Node]]:
        """Return the tensors and numbers in an object that the graph computes, with their nodes."""
        parts = [(part, self.argument(part)) for part in variables_in(item)]
        return [(part, node) for part, node in parts if isinstance(node, fx.Node)]

    def nodes_in(self, arguments: Any) -> list[fx.Node]:
        """Return the nodes in what are the arguments of a node."""
        found: list[fx.Node] = []
        fx.map_arg(arguments, found.append)
        return found

    def literal(self, value: Any) -> Any:
        """Return a plain value in the form of a node's argument; a long list becomes a constant."""
        single = isinstance(value, bool | int | float | str | type(None))
        return value if single or len(repr(value)) <= _LONGEST_LITERAL else self.constant(value)

    def bind(self, value: Any, node: fx.Node, path: Path = (), depth: int = 0) -> None:
        """Remember that a node made the tensors in a value."""
        if isinstance(value, Tensor):
            known = self.find(value)
            if known is None or known.base is not node or len(known.path) > len(path):
                self.remember(value, NodeValue(node, path))
        elif isinstance(value, list | tuple):
            for index, part in enumerate(value):
                self.bind(part, node, (*path, ("item", index)), depth + 1)
        elif isinstance(value, Mapping):
            for key in value:
                self.bind(value[key], node, (*path, ("item", key)), depth + 1)
        elif depth < _DEEPEST and not isinstance(value, nn.Module | type):
            for name, part in getattr(value, "__dict__", {}).items():
                self.bind(part, node, (*path, ("attribute", name)), depth + 1)

    def detach(self, value: Any) -> None:
        """Let the graph detach the tensors in a value that it knows, which were made without a gradient."""
        for _, tensor in tensors_in(value):
            if tensor.is_floating_point() and self.find(tensor) is not None:
                self.remember(tensor, NodeValue(self.add("call_method", "detach", (self.tensor(tensor),))))


def drawn_by(node: fx.Node, name: str) -> str:
    """Return the name of the function that a node calls to draw something."""
    if node.target is ops.call_anew:
        return node.args[0] if isinstance(node.args[0], str) else name
    return f"torch.{name}"


def _base_value(item: Any) -> Any:
    """Return a number or text of a user's class as one of Python's own classes."""
    kind: Any = next(kind for kind in _NUMBERS if isinstance(item, kind))
    return kind(item)
