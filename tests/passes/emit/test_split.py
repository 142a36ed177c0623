"""Split: one graph for each partition, with names, types, targets and metadata as they were."""

import operator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dnifx.errors import PassError
from dnifx.ir import Program
from dnifx.passes.emit.split import SplitPartitions
from dnifx.passes.graph import captured, flat_output
from tests.passes.programs import Residual, compiled, mlp, runnable

X = torch.randn(3, 6)


def split(model: nn.Module, *cuts: str) -> Program:
    return compiled(model, list(cuts), X, until="split")


def chained(program: Program) -> tuple[object, ...]:
    """Run the partitions one after the other on each other's values."""
    values: dict[str, Tensor] = {captured(program).find_nodes(op="placeholder")[0].name: X}
    outputs: tuple[Tensor, ...] = ()
    for partition, graph in zip(program.partitions, program.submodules, strict=True):
        outputs = runnable(replace(program, graph=graph))(*(values[name] for name in partition.inputs))
        values.update(zip(partition.outputs, outputs, strict=False))
    return outputs


@pytest.mark.parametrize("cuts", [["stem"], ["blocks.0"], ["stem", "blocks.0", "blocks.1"]])
def test_the_graphs_one_after_the_other_are_the_model(cuts: list[str]) -> None:
    model = Residual()
    assert torch.equal(torch.as_tensor(chained(split(model, *cuts))[0]), model(X))


def test_nodes_keep_name_target_meta_and_order() -> None:
    program = split(Residual(), "blocks.0")
    before = {node.name: node for node in captured(program).nodes}
    for partition, graph in zip(program.partitions, program.submodules, strict=True):
        inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        assert [node.name for node in inner] == [name for name in partition.nodes if name != "output"]
        for node in inner:
            assert (node.op, node.target, node.meta) == (
                before[node.name].op,
                before[node.name].target,
                before[node.name].meta,
            )
            assert node.graph is not before[node.name].graph


def test_inputs_and_outputs_are_the_partitions_own_in_order() -> None:
    program = split(Residual(), "blocks.0", "blocks.1")
    for partition, graph in zip(program.partitions, program.submodules, strict=True):
        assert tuple(node.name for node in graph.nodes if node.op == "placeholder") == partition.inputs
    assert [getattr(value, "name", None) for value in flat_output(program.submodules[0])] == list(
        program.partitions[0].outputs
    )
    assert [getattr(value, "name", None) for value in flat_output(program.submodules[-1])] == ["head"]


def test_the_last_graph_returns_what_the_model_returns_even_from_earlier_partitions() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
            h = self.first(x)
            return h, 3, self.second(h), x

    model = Two()
    program = split(model, "first")
    outputs = chained(program)
    assert outputs[1] == 3
    assert torch.equal(torch.as_tensor(outputs[0]), model(X)[0])
    assert torch.equal(torch.as_tensor(outputs[3]), X)


def test_the_captured_graph_is_left_alone() -> None:
    before = compiled(Residual(), ["blocks.0"], X, until="insert")
    nodes = list(captured(before).nodes)
    after = SplitPartitions().run(before)
    assert captured(after) is captured(before)
    assert list(captured(after).nodes) == nodes


def test_a_lost_node_is_found_out() -> None:
    program = split(mlp(6, 6, 2), "0")
    with pytest.raises(PassError, match="split made 1 nodes of 3"):
        SplitPartitions().check(replace(program, submodules=program.submodules[:1]))


def test_a_graph_that_is_not_well_formed_is_found_out() -> None:
    program = split(mlp(6, 6, 2), "0")
    other = compiled(mlp(6, 6, 2), ["0"], X, until="capture")
    broken = program.submodules[0]
    stray = next(iter(captured(other).nodes))
    with broken.inserting_before(next(iter(reversed(broken.nodes)))):
        node = broken.create_node("call_function", operator.neg, ())
    node.args = (stray,)
    with pytest.raises(RuntimeError, match="does not belong to this Graph"):
        SplitPartitions().check(program)
