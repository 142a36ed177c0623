"""Running a graph on somebody else's modules: a GraphModule that shares parameters, buffers and children with a module."""

from torch import fx, nn


def attach(graph: fx.Graph, owner: nn.Module, name: str) -> fx.GraphModule:
    """Return a GraphModule over the owner's own modules, parameters and buffers.

    The three registries are the owner's very dictionaries, so what is moved, cast, replaced or loaded there is seen here.

    Args:
        graph: Its targets are paths in the owner.
        owner: What holds the modules.
        name: Class name of the result, as code and errors show it.
    """
    module = fx.GraphModule(owner, graph, name)
    for registry in ("_modules", "_parameters", "_buffers"):
        module.__dict__[registry] = owner.__dict__[registry]
    return module
