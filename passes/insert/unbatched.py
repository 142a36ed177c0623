"""Inputs without a batch dimension: layers say that what they take is one example."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.nn import functional

from dnifx.errors import DnifxWarning
from dnifx.ir import Program
from dnifx.passes.graph import captured, described
from dnifx.passes.measure import batch_input

ONE_EXAMPLE: Mapping[Any, int] = {
    nn.Linear: 1,
    nn.Bilinear: 1,
    nn.RNNCellBase: 1,
    nn.RNNBase: 2,
    nn.MultiheadAttention: 2,
    nn.TransformerEncoderLayer: 2,
    nn.Conv1d: 2,
    nn.Conv2d: 3,
    nn.Conv3d: 4,
    functional.linear: 1,
    functional.conv1d: 2,
    functional.conv2d: 3,
    functional.conv3d: 4,
}
"""The number of dimensions of one example, for each layer that also takes examples without a batch dimension."""


def warn_without_batch(program: Program) -> None:
    """Warn where a layer takes the model's input as one example: estimators take its first dimension for the batch."""
    name = batch_input(program)
    if name is None or program.batch_dim != 0:
        return
    layer = next((node for node in reached(program, name) if takes_one(program, node)), None)
    if layer is not None:
        warnings.warn(
            f"{described(layer)} takes the input {name} ({program.measures[name].tensors[0]}) as one example, without a batch dimension, "
            "but the first dimension is taken for the batch: estimators would see features as examples. Give inputs with a batch "
            "dimension, x[None] for one example, both here and in training",
            DnifxWarning,
            stacklevel=2,
        )


def reached(program: Program, name: str) -> list[fx.Node]:
    """Return the nodes whose first argument is the input, or something that still has its first dimension, in order."""
    first = program.measures[name].tensors[0].shape[:1]
    holding, found = set[fx.Node](), []
    for node in captured(program).nodes:
        taken = bool(node.args) and isinstance(node.args[0], fx.Node) and node.args[0] in holding
        if taken:
            found.append(node)
        measure = program.measures.get(node.name)
        if (taken or node.name == name) and measure is not None and measure.is_tensor:
            holding |= {node} if measure.tensors[0].shape[:1] == first else set()
    return found


def takes_one(program: Program, node: fx.Node) -> bool:
    """Whether a node is a layer whose first argument, a tensor, is one example."""
    layer: Any = node.target
    if node.op == "call_module":
        kinds = type(program.model.get_submodule(str(node.target))).__mro__
        layer = next((kind for kind in kinds if kind in ONE_EXAMPLE), None)
    return ONE_EXAMPLE.get(layer) == len(program.measures[node.all_input_nodes[0].name].tensors[0].shape)
