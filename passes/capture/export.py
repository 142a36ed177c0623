"""Capture by torch.export: operators instead of modules. The training flags are frozen, so each mode is an input kind."""

import functools
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.refusals import Refused, as_sentence
from dnifx.passes.capture.signature import CapturedSignature
from dnifx.passes.capture.symbolic import TreeOutput
from dnifx.passes.torch_logging import quiet_loggers

GUARDS = "_guards_fn"
"""The submodule of an exported program that checks sizes. Its node is left out, since capture verifies other sizes itself."""


def export_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedGraph:
    """Export the model and return its graph over the model's own parameters and buffers.

    Raises:
        CaptureError: torch.export refuses the model.
    """
    signature = CapturedSignature.of(model, args, kwargs)
    bound = signature.call.bind(args, kwargs)
    try:
        sizes = pytree.tree_map(any_size, (*bound.args, *bound.kwargs.values()))
        with (
            quiet_loggers("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor"),
            redirect_stderr(StringIO()),
        ):
            program = torch.export.export(model, bound.args, bound.kwargs, dynamic_shapes=sizes, strict=False)
        module = program.module()
    except Exception as error:
        raise Refused(
            f"torch.export does not take it: {as_sentence(error)}", "Keep that part whole: cut outside of it"
        ) from error
    if program.call_spec.out_spec is None:
        raise Refused("torch.export gives no structure of its output", "Return a tensor, tuple, list or dict")
    graph, inputs, constants = over_model(module, model, pytree.tree_leaves((bound.args, bound.kwargs)))
    output = TreeOutput(program.call_spec.out_spec)
    signature = replace(signature, inputs=inputs, output=output, modules=tuple(model.modules()))
    notes = ("captured by torch.export: hooks that are added later do not run",)
    return CapturedGraph(graph, signature, constants, notes=notes)


def any_size(leaf: Any) -> Any:
    """Let every size of a tensor be any, as far as the model allows."""
    return [torch.export.Dim.AUTO] * leaf.dim() if isinstance(leaf, Tensor) else None


def over_model(
    module: fx.GraphModule, model: nn.Module, leaves: list[Any]
) -> tuple[fx.Graph, tuple[str, ...], dict[str, Any]]:
    """Copy an exported graph: what the model does not hold becomes a constant, and an input that is not a tensor a literal."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    inputs: dict[int, fx.Node] = {}
    constants: dict[str, Any] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    held = {name for name, _ in (*parameters, *buffers)}
    values = iter(leaves)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            leaf = next(values)
            if isinstance(leaf, Tensor) and id(leaf) not in inputs:
                inputs[id(leaf)] = graph.create_node("placeholder", node.name, name=node.name)
            copies[node] = inputs.get(id(leaf), leaf)
        elif node.op == "output":
            flat = pytree.tree_leaves(node.args[0])
            graph.output(tuple(copies.get(value, value) if isinstance(value, fx.Node) else value for value in flat))
        elif not (node.op == "call_module" and node.target == GUARDS):
            copies[node] = graph.node_copy(node, lambda source: copies[source])
            copies[node].meta = {"nn_module_stack": module_stack(node)}
            if node.op == "get_attr" and node.target not in held:
                name = f"_constant{len(constants)}"
                constants[name] = attribute(module, str(node.target))
                copies[node].target = name
    return graph, tuple(node.name for node in inputs.values()), constants


def module_stack(node: fx.Node) -> OrderedDict[str, tuple[str, Any]]:
    """Return the modules that a node lies in as torch.fx writes them: ``path`` or ``path@1`` to (path, type)."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    paths = [(str(entry[0]).removeprefix("L['self']").lstrip("."), entry[1]) for entry in entries]
    return OrderedDict((path, (path.partition("@")[0], kind)) for path, kind in paths if path)


def attribute(module: nn.Module, path: str) -> Any:
    """Return the attribute at a dotted path."""
    return functools.reduce(getattr, path.split("."), module)
