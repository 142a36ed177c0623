"""Capture by torch.export: operators instead of modules, train and eval frozen, so each mode is a input kind of its own."""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.errors import CaptureError
from dnifx.passes.capture.signature import Slot, TreeSignature, bind, forward_signature, is_fixed
from dnifx.passes.capture.symbolic import Trace
from dnifx.passes.torch_logging import quiet_loggers

GUARDS = "_guards_fn"
"""The submodule of an exported program that checks sizes; its node is left out, since capture verifies other sizes itself."""


def export_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Export the model and return its graph over the model's own parameters and buffers.

    Raises:
        CaptureError: torch.export refuses the model.
    """
    call = forward_signature(model)
    arguments = bind(call, args, kwargs, type(model).__name__)
    bound = call.bind_partial()
    bound.arguments.update(arguments)
    try:
        sizes = pytree.tree_map(any_size, (bound.args, bound.kwargs))
        with (
            quiet_loggers("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor"),
            redirect_stderr(StringIO()),
        ):
            program = torch.export.export(
                model, bound.args, bound.kwargs, dynamic_shapes=flat_sizes(sizes), strict=False
            )
        module = program.module()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise CaptureError(f"torch.export refuses {type(model).__name__}: {type(error).__name__}: {first}") from error
    leaves, spec = pytree.tree_flatten(arguments)
    graph, inputs, constants = adopted(module, model, leaves)
    slots = tuple(Slot(leaf) if is_fixed(leaf) else None for leaf in leaves)
    plain = all(isinstance(value, Tensor) for value in arguments.values()) and not bound.kwargs
    output = program.call_spec.out_spec
    if output is None:
        raise CaptureError(f"torch.export gives no output structure for {type(model).__name__}")
    modules = tuple(model.modules())
    signature = TreeSignature(inputs, spec, slots, output, call, plain, type(model).__name__, modules)
    return Trace(graph, signature, constants, ())


def any_size(leaf: Any) -> Any:
    """Let every size of a tensor be any, as far as the model allows."""
    return [torch.export.Dim.AUTO] * leaf.dim() if isinstance(leaf, Tensor) else None


def flat_sizes(sizes: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
    """Return the sizes in the form that torch.export takes: positional first, then keywords in order."""
    return (*sizes[0], *sizes[1].values())


def adopted(
    module: fx.GraphModule, model: nn.Module, leaves: list[Any]
) -> tuple[fx.Graph, tuple[str, ...], dict[str, Any]]:
    """Copy an exported graph; what it reads and the model does not hold becomes a constant, a fixed input a literal."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    inputs: list[str] = []
    constants: dict[str, Any] = {}
    held = {
        name
        for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    }
    values = iter(leaves)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            leaf = next(values)
            copies[node] = leaf if is_fixed(leaf) else graph.create_node("placeholder", node.name, name=node.name)
            inputs += [] if is_fixed(leaf) else [copies[node].name]
        elif node.op == "output":
            flat, _ = pytree.tree_flatten(node.args[0])
            graph.output(tuple(copies.get(value, value) if isinstance(value, fx.Node) else value for value in flat))
        elif not (node.op == "call_module" and node.target == GUARDS):
            copies[node] = graph.node_copy(node, lambda source: copies[source])
            copies[node].meta = {"nn_module_stack": module_stack(node)}
            if node.op == "get_attr" and node.target not in held:
                name = f"_constant{len(constants)}"
                constants[name] = attribute(module, str(node.target))
                copies[node].target = name
    return graph, tuple(inputs), constants


def module_stack(node: fx.Node) -> OrderedDict[str, tuple[str, Any]]:
    """Return the modules that a node lies in as torch.fx writes them: ``path`` or ``path@1`` to (path, type)."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    paths = [(str(entry[0]).removeprefix("L['self']").lstrip("."), entry[1]) for entry in entries]
    return OrderedDict((path, (path.partition("@")[0], kind)) for path, kind in paths if path)


def attribute(module: nn.Module, path: str) -> Any:
    """Return what a dotted path names."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
