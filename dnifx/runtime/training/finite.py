"""The buffers that a step writes, which go back with updates that are not made."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dnifx.ir import Program


def statistics_of(program: Program) -> dict[str, list[Tensor]]:
    """Return the buffers that a step writes, by the partition or the key of the boundary that they belong to."""
    found = written_buffers(program)
    for each in program.interfaces:
        models = [model for model in (each.estimator, each.input_model) if model is not None]
        found[program.boundaries[each.boundary].key] = [buffer for model in models for buffer in running(model)]
    return found


def written_buffers(program: Program) -> dict[str, list[Tensor]]:
    """Return the buffers that each partition writes, by the partition's name."""
    if program.graph is None:
        return {}
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[str, list[Tensor]] = {}
    for partition in program.partitions:
        own: dict[int, Tensor] = {}
        for name in partition.nodes:
            node = nodes.get(name)
            if node is None:
                continue
            if node.op == "call_module":
                own.update((id(each), each) for each in running(program.model.get_submodule(str(node.target))))
            for written in program.measures[name].writes if name in program.measures else ():
                source = nodes.get(written)
                if source is not None and source.op == "get_attr":
                    own.update((id(each), each) for each in buffer_at(program.model, str(source.target)))
        found[partition.name] = list(own.values())
    return found


def running(module: nn.Module) -> list[Tensor]:
    """Return the running statistics of normalisations in a module."""
    layers = [each for each in module.modules() if isinstance(each, _NormBase)]
    return [each for layer in layers for each in layer.buffers(recurse=False)]


def buffer_at(model: nn.Module, path: str) -> list[Tensor]:
    """Return the buffer at a path; none where something else is there."""
    return [each for name, each in model.named_buffers(remove_duplicate=False) if name == path]
