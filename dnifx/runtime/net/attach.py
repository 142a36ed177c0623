"""Running a graph on somebody else's modules: a GraphModule that shares parameters, buffers and children with a module."""

from torch import fx, nn

from dnifx.runtime.emitted.checkpoints import with_checkpoints


def attach(graph: fx.Graph, owner: nn.Module, name: str) -> fx.GraphModule:
    """Return a GraphModule over the owner's own modules, parameters and buffers.

    The three registries are the owner's very dictionaries, so what is moved, cast, replaced or loaded there is seen here;
    the owner's other attributes are not, so a child may bear the name of one (``loss``, ``program``).

    Args:
        graph: Its targets are paths in the owner.
        owner: What holds the modules.
        name: Class name of the result, as code and errors show it.
    """
    registries = {registry: owner.__dict__[registry] for registry in ("_modules", "_parameters", "_buffers")}
    holder = nn.Module()
    holder.__dict__.update(registries, training=owner.training)
    module = fx.GraphModule(holder, with_checkpoints(graph), name)
    module.__dict__.update(registries)
    return module
