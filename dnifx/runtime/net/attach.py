"""Running a graph on somebody else's modules: a GraphModule that shares parameters, buffers and children with a module."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnifx.runtime.emitted.source import with_safe_source

REGISTRIES = ("_modules", "_parameters", "_buffers")


class AttachedGraph(fx.GraphModule):
    """A GraphModule over the modules, parameters and buffers of another module, whatever these are called."""

    def __init__(self, graph: fx.Graph, held: Mapping[str, Any], name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)  # of an empty graph: torch.fx would copy what a graph names
        self.graph = with_safe_source(graph)
        graph.owning_module = None  # or a graph could not be copied without the module, and would be checked against it
        self.__dict__.update(held)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttachedGraph":
        """Return a copy over the copies of the registries, which a copy of their owner has too."""
        held = {registry: deepcopy(self.__dict__[registry], memo) for registry in REGISTRIES}
        return AttachedGraph(deepcopy(self.graph, memo), held | {"training": self.training}, type(self).__name__)

    def __reduce__(self) -> Any:
        """Save the graph and what it is attached to, and no code."""
        held = {registry: self.__dict__[registry] for registry in REGISTRIES}
        return AttachedGraph, (self.graph, held | {"training": self.training}, type(self).__name__)


def attach(graph: fx.Graph, owner: nn.Module, name: str) -> AttachedGraph:
    """Return a GraphModule over the owner's own modules, parameters and buffers.

    The three registries are the owner's very dictionaries, so what is moved, cast, replaced or loaded there is seen here;
    the owner's other attributes are not, so a child may bear the name of one (``loss``, ``program``).

    Args:
        graph: Its targets are paths in the owner.
        owner: What holds the modules.
        name: Class name of the result, as code and errors show it.
    """
    held = {registry: owner.__dict__[registry] for registry in REGISTRIES}
    return AttachedGraph(graph, held | {"training": owner.training}, name)


def on_device(module: fx.GraphModule, before: torch.device, after: torch.device) -> fx.GraphModule:
    """Return a graph that names one device where a module's graph names another; the module itself where it does not."""

    def moved(value: Any) -> Any:
        return after if isinstance(value, torch.device) and value == before else value

    graph = deepcopy(module.graph)
    changed = False
    for node in graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), moved)
        changed = changed or args != node.args or kwargs != node.kwargs
        node.args, node.kwargs = args, kwargs
    if not changed:
        return module
    held = {registry: module.__dict__[registry] for registry in REGISTRIES}
    return AttachedGraph(graph, held | {"training": module.training}, type(module).__name__)


def attach_values(graph: fx.Graph, values: Mapping[str, Any], name: str) -> AttachedGraph:
    """Return a GraphModule that holds values at the paths that the graph names.

    Its parameters stand in the order of depth and path. So optimizers that number them can be loaded in another process.

    Args:
        graph: Its targets are keys of ``values``.
        values: Modules, parameters, buffers and other values by path.
        name: Class name of the result.
    """
    root = nn.Module()
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    for path in sorted(targets, key=lambda target: (target.count("."), target)):  # one order in all processes
        *parents, last = path.split(".")
        holder, value = root, values[path]
        for parent in parents:
            holder = holder._modules.setdefault(parent, nn.Module())  # type: ignore[assignment]
        kinds = ("_modules", nn.Module), ("_parameters", nn.Parameter), ("_buffers", Tensor)
        registry = next((registry for registry, kind in kinds if isinstance(value, kind)), None)
        (vars(holder) if registry is None else vars(holder)[registry])[last] = value
    return attach(graph, root, name)
