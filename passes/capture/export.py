"""Capture by torch.export: operators instead of modules. The training flags are frozen, so each mode is an input kind."""

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dnifx.ir import constants_root
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.refusals import Refused, as_sentence
from dnifx.passes.capture.signature import CapturedSignature
from dnifx.passes.capture.symbolic import TreeOutput
from dnifx.passes.torch_logging import quiet_loggers
from dnifx.runtime.emitted.source import reserve_names

HARMLESS = re.compile(r"[A-Za-z0-9_.\- ]*")
GUARDS = "_guards_fn"
"""The submodule of an exported program that checks sizes. Its node is left out, since capture verifies other sizes itself."""


def export_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CapturedGraph:
    """Export the model and return its graph over the model's own parameters and buffers.

    Raises:
        CaptureError: torch.export refuses the model.
    """
    refuse_names(model, args, kwargs)
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


def refuse_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise Refused where a module, tensor or key has a name that could run: torch.export pastes names into code."""
    held = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    steps, _ = pytree.tree_flatten_with_path((args, dict(kwargs)))
    keys = (str(step.key) for path, _ in steps for step in path if isinstance(step, pytree.MappingKey))
    for name in (*(name for name, _ in held), *keys):
        if HARMLESS.fullmatch(name) is None:
            raise Refused(
                f"torch.export writes names into code that it runs, and {name!r} could do harm there",
                "Give it a name of letters, digits, underscores, hyphens and spaces",
            )


def any_size(leaf: Any) -> Any:
    """Let every size of a tensor be any, as far as the model allows."""
    return [torch.export.Dim.AUTO] * leaf.dim() if isinstance(leaf, Tensor) else None


def over_model(
    module: fx.GraphModule, model: nn.Module, leaves: list[Any]
) -> tuple[fx.Graph, tuple[str, ...], dict[str, Any]]:
    """Copy an exported graph: what the model does not hold becomes a constant, and an input that is not a tensor a literal."""
    graph, root = fx.Graph(), constants_root(model)
    reserve_names(graph)
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
                made = inputs[id(leaf)] = graph.create_node("placeholder", node.name, name=node.name)
                made.target = made.name
            copies[node] = inputs.get(id(leaf), leaf)
        elif node.op == "output":
            flat = pytree.tree_leaves(node.args[0])
            graph.output(tuple(copies.get(value, value) if isinstance(value, fx.Node) else value for value in flat))
        elif not (node.op == "call_module" and node.target == GUARDS):
            copies[node] = graph.node_copy(node, lambda source: copies[source])
            copies[node].meta = {"nn_module_stack": module_stack(node)}
            if node.op == "get_attr" and node.target not in held:
                path = f"{root}.constant{len(constants)}"
                constants[path] = attribute(module, str(node.target))
                copies[node].target = path
    return graph, tuple(node.name for node in inputs.values()), constants


def module_stack(node: fx.Node) -> OrderedDict[str, tuple[str, Any]]:
    """Return the modules that a node lies in as torch.fx writes them: ``path`` or ``path@1`` to (path, type)."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    paths = [(str(entry[0]).removeprefix("L['self']").lstrip("."), entry[1]) for entry in entries]
    return OrderedDict((path, (path.partition("@")[0], kind)) for path, kind in paths if path)


def attribute(module: nn.Module, path: str) -> Any:
    """Return the attribute at a dotted path."""
    return functools.reduce(getattr, path.split("."), module)
