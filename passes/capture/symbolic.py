"""Capture by torch.fx: trace the model symbolically; a submodule that cannot be traced is kept whole, as one node."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.ir import Kept, constants_root
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.refusals import Refused, as_sentence
from dnifx.passes.capture.signature import CapturedSignature
from dnifx.runtime.emitted.ops import Template, detached
from dnifx.runtime.emitted.source import reserve_names


@dataclass(frozen=True)
class TreeOutput:
    """Builds an output of the structure that pytree found."""

    spec: pytree.TreeSpec

    def __call__(self, values: Sequence[Any]) -> Any:
        """Return the output around the graph's flat outputs."""
        return pytree.tree_unflatten(values, self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TreeOutput":
        """Return itself: it never changes, and torch warns when a TreeSpec is copied."""
        return self


def trace_symbolically(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedGraph:
    """Trace the model in training and in evaluation mode; a submodule whose graph depends on the mode is kept whole.

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
            raise Refused(
                "forward itself does something else in training than in evaluation, and torch.fx traces one mode only",
                "Use a module for it, such as nn.Dropout, or move that code into a submodule, which is then kept whole",
            )
        whole[path] = "its forward differs between training and evaluation"


def trace_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: Mapping[str, str]
) -> CapturedGraph:
    """Trace the model in its present mode, keeping the named submodules whole."""
    tracer = PathTracer(model, args, kwargs, whole)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise Refused(
            f"torch.fx cannot trace forward: {as_sentence(error)}",
            "Move code that depends on a tensor's value or type into a submodule, which is then kept whole",
        ) from error
    return CapturedGraph(graph, tracer.signature, dict(tracer.constants), tuple(tracer.kept))


def trace_in_other_mode(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: Mapping[str, str]
) -> CapturedGraph:
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
    for left, right in zip(one.nodes, other.nodes, strict=False):
        if not alike(left, right):
            return common_module(left, right)
    return None if len(one.nodes) == len(other.nodes) else ""


def alike(left: fx.Node, right: fx.Node) -> bool:
    """Whether two nodes of two graphs do the same."""
    return (left.op, left.target) == (right.op, right.target) and repr((left.args, left.kwargs)) == repr(
        (right.args, right.kwargs)
    )


def common_module(left: fx.Node, right: fx.Node) -> str:
    """Return the path of the innermost module that both nodes lie in."""
    shared = [path for path in module_paths(left) if path in module_paths(right)]
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
        self.signature = CapturedSignature.of(model, args, kwargs)
        self.bound = self.signature.call.bind(args, kwargs)
        self.tensors = self.signature.tensors(args, kwargs)
        self.whole = whole
        self.grad_enabled = torch.is_grad_enabled()
        self.constants: dict[str, Any] = {}
        self.kept: list[Kept] = []

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make one placeholder for each tensor among the arguments; everything else is fixed."""
        template = Template((self.bound.args, self.bound.kwargs), [tensor for _, tensor in self.tensors])
        reserve_names(self.graph)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name, _ in self.tensors]
        for proxy in inputs:
            proxy.node.target = proxy.node.name
        args, kwargs = template.build(inputs)

        def flat_forward(model: nn.Module) -> tuple[Any, ...]:
            flat, spec = pytree.tree_flatten(root_fn(model, *args, **kwargs))
            names = tuple(proxy.node.name for proxy in inputs)
            self.signature = replace(self.signature, inputs=names, output=TreeOutput(spec))
            return tuple(flat)

        return flat_forward, [self.root]

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Record one operation; inside ``torch.no_grad()`` its value is detached."""
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind.startswith("call") and self.grad_enabled and not torch.is_grad_enabled():
            return super().create_proxy("call_function", detached, (proxy,), {})
        return proxy

    def create_arg(self, a: Any) -> Any:
        """Write a value into the graph; a tensor that the model does not hold becomes a constant."""
        if isinstance(a, Tensor) and a not in self.tensor_attrs and not self.held(a):
            known = (path for path, value in self.constants.items() if value is a)
            path = next(known, f"{constants_root(self.root)}.constant{len(self.constants)}")
            self.constants[path] = a
            return self.create_node("get_attr", path, (), {})
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)

    def held(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the model."""
        return isinstance(tensor, nn.Parameter) or any(tensor is buffer for buffer in self.root.buffers())

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read a parameter or buffer by a new node each time, so that an erased node is never used again."""
        return super().getattr(attr, attr_val, {})

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a submodule; where that fails, erase its nodes and keep it whole."""
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
            return self.keep(path, as_sentence(error), args, kwargs)

    def keep(self, path: str, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a submodule as one node and say why."""
        self.kept.append(Kept(path, reason))
        return self.create_proxy("call_module", path, args, kwargs)
