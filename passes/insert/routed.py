"""Values with as many rows as the data decides, as those that a router picks: their rows are no examples."""

from dataclasses import replace

import torch
from torch import fx

from dnifx.errors import EstimatorError
from dnifx.estimators import BoundarySpec
from dnifx.ir import Program, TensorSpec
from dnifx.passes.capture.record.functions import SHAPED_LIKE_FIRST, name_of
from dnifx.passes.graph import RAGGED, captured, described


def data_rows(program: Program) -> dict[str, str]:
    """Return the nodes whose first size depends on the values of tensors, each with the operation that decides it."""
    found: dict[str, str] = {}
    nodes = captured(program).nodes
    for node in nodes if any(map(decides_rows, nodes)) else ():
        if decides_rows(node):
            found[node.name] = described(node)
            continue
        sources = [source for source in node.all_input_nodes if source.name in found]
        if node.op == "call_function" and name_of(node.target) in SHAPED_LIKE_FIRST:
            sources = [source for source in sources if source is node.args[0]]
        place = next((found[each.name] for each in sources if rows(program, each) == rows(program, node)), None)
        if place is not None and rows(program, node) is not None:
            found[node.name] = place
    return found


def decides_rows(node: fx.Node) -> bool:
    """Whether the shape of what a node computes depends on values."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return RAGGED in node.meta or torch.Tag.dynamic_output_shape in tags


def rows(program: Program, node: fx.Node) -> int | None:
    """Return the first size of a node's first tensor, if it has one."""
    measure = program.measures.get(node.name)
    tensors = measure.tensors if measure is not None else ()
    return tensors[0].shape[0] if tensors and tensors[0].shape else None


def with_other_rows(spec: BoundarySpec) -> BoundarySpec:
    """Return what a boundary may be in another call: the data decide for other numbers of rows, each for its own."""
    changed = [
        TensorSpec((value.shape[0] + 2 + index, *value.shape[1:]), value.dtype, value.requires_grad, value.device)
        if index in spec.routed
        else value
        for index, value in enumerate(spec.values)
    ]
    return replace(spec, values=tuple(changed))


def refuse_routed(spec: BoundarySpec, estimator: str, places: dict[str, str], error: EstimatorError) -> EstimatorError:
    """Return the error for an estimator that takes no other number of rows than the example has."""
    index = min(spec.routed)
    name = spec.names[index] if spec.names else f"value {index}"
    where = places.get(name, "a router")
    return EstimatorError(
        f"boundary {spec.name!r}: the data decide the first size of {name} ({spec.values[index]}), by {where}, and the estimator "
        f"{estimator} takes no other size than the example's. Give gradient='synthetic' or 'zero' for this boundary, or cut where rows "
        f"are examples: before the routing, or behind what joins the rows ({str(error).splitlines()[0]})"
    )
