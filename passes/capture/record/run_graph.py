"""Runs a captured graph on the model that it was captured from."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from dnifx.ir import Signature
from dnifx.runtime.emitted.checkpoints import with_checkpoints


def runnable(model: nn.Module, graph: fx.Graph, constants: Mapping[str, object]) -> fx.GraphModule:
    """Return a module that runs the graph with the model's own submodules, parameters and buffers."""
    root = nn.Module()
    root._modules, root._parameters, root._buffers = model._modules, model._parameters, model._buffers
    vars(root).update(constants)
    module = fx.GraphModule(root, with_checkpoints(graph), class_name=f"Captured{type(model).__name__}")
    graph.owning_module = None  # or lint asks this module for what the passes to come put into the graph
    return module


def replay(
    model: nn.Module, graph: fx.Graph, constants: Mapping[str, object], signature: Signature
) -> Callable[..., Any]:
    """Return a function that is called as the model is and runs the graph."""
    module = runnable(model, graph, constants)
    return lambda *args, **kwargs: signature.unflatten(module(*signature.flatten(args, kwargs)))
