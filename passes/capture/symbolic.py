"""Symbolic capture with torch.fx: trace through; a submodule that cannot be traced is kept whole, as one node."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError
from dnifx.ir import Kept
from dnifx.passes.capture.signature import Slot, TreeSignature, bind, forward_signature, is_fixed, leaf_names
from dnifx.runtime.emitted.interface import detached


@dataclass(frozen=True)
class Trace:
    """A captured graph and what it needs: its signature, the constants it reads, the submodules kept whole."""

    graph: fx.Graph
    signature: TreeSignature
    constants: Mapping[str, Any]
    kept: tuple[Kept, ...]


def trace_symbolically(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Trace the model with torch.fx, in train and in eval mode; a submodule whose graph depends on the mode is kept whole.

    Raises:
        CaptureError: The model's own forward (not a submodule's) cannot be traced or depends on the mode.
    """
    whole: dict[str, str] = {}
    while True:
        trace = trace_once(model, args, kwargs, whole)
        other = trace_in_other_mode(model, args, kwargs, whole)
        path = first_difference(trace.graph, other.graph)
        if path is None:
            return trace
        if path in ("", *whole):
            raise CaptureError(
                f"the forward of {type(model).__name__} itself does something else in training than in evaluation (a functional "
                "dropout, or `if self.training`), which a symbolic trace cannot keep; use a module for it (nn.Dropout), or "
                "move that code into a submodule, which is then kept whole"
            )
        whole[path] = "its forward differs between training and evaluation"


def trace_once(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: Mapping[str, str]) -> Trace:
    """Trace the model as it stands, keeping the named submodules whole."""
    tracer = PathTracer(model, args, kwargs, whole)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise CaptureError(
            f"the forward of {type(model).__name__} cannot be traced: {type(error).__name__}: {error}\n"
            "what depends on a tensor's value or on its type belongs into a submodule, which is then kept whole as one node"
        ) from error
    return Trace(graph, tracer.signature(), dict(tracer.constants), tuple(tracer.kept))


def trace_in_other_mode(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: Mapping[str, str]
) -> Trace:
    """Trace the model with every training flag flipped, and put the flags back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, flag in flags:
            module.training = not flag
        return trace_once(model, args, kwargs, whole)
    finally:
        for module, flag in flags:
            module.training = flag


def first_difference(one: fx.Graph, other: fx.Graph) -> str | None:
    """Return the path of the module where two graphs first differ, or None where they are the same."""
    if len(one.nodes) == len(other.nodes) and all(
        alike(left, right) for left, right in zip(one.nodes, other.nodes, strict=True)
    ):
        return None
    for left, right in zip(one.nodes, other.nodes, strict=False):
        if not alike(left, right):
            return common_module(left, right)
    return ""


def alike(left: fx.Node, right: fx.Node) -> bool:
    """Whether two nodes of two graphs do the same."""
    return (left.op, left.target) == (right.op, right.target) and repr((left.args, left.kwargs)) == repr(
        (right.args, right.kwargs)
    )


def common_module(left: fx.Node, right: fx.Node) -> str:
    """Return the path of the innermost module that both nodes lie in."""
    paths = [module_paths(left), module_paths(right)]
    shared = [path for path in paths[0] if path in paths[1]]
    return shared[-1] if shared else ""


def module_paths(node: fx.Node) -> list[str]:
    """Return the paths of the modules that a node lies in, outermost first, the root excluded."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if entry[0]]
    return [path for path in paths if path != node.target] if node.op == "call_module" else paths


class PathTracer(fx.Tracer):
    """A torch.fx tracer with flat inputs and outputs that keeps whole what cannot be traced."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.call = forward_signature(model)
        self.label = type(model).__name__
        self.leaves, self.spec = pytree.tree_flatten(bind(self.call, args, kwargs, self.label))
        self.whole = whole
        self.grad_enabled = torch.is_grad_enabled()
        self.inputs: list[str] = []
        self.constants: dict[str, Any] = {}
        self.kept: list[Kept] = []
        self.output: pytree.TreeSpec | None = None

    def signature(self) -> TreeSignature:
        """Return how the traced graph is called."""
        leaves = tuple(Slot(leaf) if is_fixed(leaf) else None for leaf in self.leaves)
        names = list(self.call.parameters)
        plain = not any(leaves) and list(names)[: len(leaves)] == list(pytree.tree_unflatten(self.leaves, self.spec))
        plain = plain and all(
            isinstance(value, Tensor) for value in pytree.tree_unflatten(self.leaves, self.spec).values()
        )
        if self.output is None:
            raise CaptureError(f"{self.label} was not traced to its end; trace it before asking for its signature")
        return TreeSignature(tuple(self.inputs), self.spec, leaves, self.output, self.call, plain, self.label)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make one placeholder for each tensor among the bound arguments; everything else is fixed."""
        values = [
            leaf if is_fixed(leaf) else self.placeholder(name)
            for name, leaf in zip(leaf_names(self.spec), self.leaves, strict=True)
        ]
        bound = pytree.tree_unflatten(values, self.spec)
        call = self.call.bind_partial()
        call.arguments.update(bound)

        def flat_forward(model: nn.Module) -> tuple[Any, ...]:
            output, self.output = pytree.tree_flatten(root_fn(model, *call.args, **call.kwargs))
            return tuple(output)

        return flat_forward, [self.root]

    def placeholder(self, name: str) -> fx.Proxy:
        """Make one input of the graph."""
        proxy = self.create_proxy("placeholder", name, (), {})
        self.inputs.append(proxy.node.name)
        return proxy

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Record one operation; what runs inside ``torch.no_grad()`` gives detached values."""
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind.startswith("call") and self.grad_enabled and not torch.is_grad_enabled():
            return super().create_proxy("call_function", detached, (proxy,), {})
        return proxy

    def create_arg(self, a: Any) -> Any:
        """Write a value into the graph; a tensor that the model does not hold becomes a constant."""
        if isinstance(a, Tensor) and a not in self.tensor_attrs and not self.held(a):
            name = next(
                (name for name, value in self.constants.items() if value is a),
                f"_constant{len(self.constants)}",
            )
            self.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def held(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the model."""
        return isinstance(tensor, nn.Parameter) or any(tensor is buffer for buffer in self.root.buffers())

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read a parameter or buffer by a node of its own each time, so that an erased one is never used again."""
        return super().getattr(attr, attr_val, {})

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a submodule; where that fails, forget what was recorded in it and keep it whole."""
        path = self.path_of_module(m)
        if path in self.whole:
            return self.keep(path, self.whole[path], args, kwargs)
        before = next(reversed(self.graph.nodes), None)
        kept = len(self.kept)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a forward raises under tracing is a reason to keep it whole
            for node in reversed(self.graph.nodes):
                if node is before:
                    break
                self.graph.erase_node(node)
            del self.kept[kept:]
            self.module_stack = stack
            return self.keep(path, f"{type(error).__name__}: {str(error).splitlines()[0]}", args, kwargs)

    def keep(self, path: str, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a submodule as one node and say why."""
        self.kept.append(Kept(path, reason))
        return self.create_proxy("call_module", path, args, kwargs)
