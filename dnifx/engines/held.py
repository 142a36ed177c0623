"""Which tensors each partition of a program needs: they live where the partition does."""

from collections.abc import Iterator

from torch import Tensor, fx, nn

from dnifx.ir import Program


def tensors_of_partitions(program: Program) -> tuple[dict[str, Tensor], ...]:
    """Return the parameters, buffers and constants that each partition reads, by name."""
    known = tensors_by_name(program)
    found: tuple[dict[str, Tensor], ...] = tuple(
        {name: known[name] for name in each.uses if name in known} for each in program.partitions
    )
    for node in program.graph.nodes if program.graph is not None else ():
        users = [node, *node.users] if node.op == "get_attr" else [node]
        homes = {program.partition_of[each.name] for each in users if each.name in program.partition_of}
        for name in tensors_at(node, known):
            for home in homes:
                found[home][name] = known[name]
    return found


def tensors_by_name(program: Program) -> dict[str, Tensor]:
    """Return all tensors that the graph of a program can name."""
    model, constants = (
        program.model,
        {name: each for name, each in program.constants.items() if isinstance(each, Tensor)},
    )
    parameters, buffers = (dict(each(remove_duplicate=False)) for each in (model.named_parameters, model.named_buffers))
    return {**constants, **buffers, **parameters}


def tensors_at(node: fx.Node, known: dict[str, Tensor]) -> Iterator[str]:
    """Return the names of the tensors that a node reads from the model."""
    if node.op == "get_attr" and str(node.target) in known:
        yield str(node.target)
    if node.op == "call_module":
        yield from (name for name in known if name.startswith(f"{node.target}."))


def tensors_of_boundaries(program: Program) -> Iterator[tuple[int, Tensor]]:
    """Return the tensors of estimators and input models, each with the partition that produces the values."""
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        models: list[nn.Module] = [each for each in (interface.estimator, interface.input_model) if each is not None]
        for model in models:
            yield from ((boundary.producer, each) for each in (*model.parameters(), *model.buffers()))
