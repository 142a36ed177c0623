"""The graph for Model Explorer holds every operation, in layers that nest, and leads along the graph's own edges."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.ir import Program
from dnifx.report.explorer import graph_collection
from dnifx.report.items import unfolded
from tests.report.test_report_html import every_program, program

OWN = {"id", "label", "namespace", "attrs", "incomingEdges", "outputsMetadata", "style"}
"""The fields of a node that Model Explorer knows and that are used here."""


@cache
def graph(name: str) -> dict[str, Any]:
    return the_graph(program(name))


def the_graph(shown: Program) -> dict[str, Any]:
    collection = graph_collection(shown)
    (only,) = collection["graphs"]
    assert collection["label"] == only["id"]
    return only  # type: ignore[no-any-return]


@every_program
def test_each_box_is_one_node_and_each_way_one_edge(name: str) -> None:
    whole, nodes = unfolded(program(name)), graph(name)["nodes"]
    boxes = {str(place): item for place, item in enumerate(whole.items) if item.kind in ("operation", "gate", "end")}
    assert [node["id"] for node in nodes] == list(boxes)
    assert all(set(node) <= OWN for node in nodes)
    edges = [(edge["sourceNodeId"], node["id"]) for node in nodes for edge in node["incomingEdges"]]
    assert sorted(edges) == sorted((str(flow.source), str(flow.target)) for flow in whole.flows)
    for node in nodes:
        ends = [edge["targetNodeInputId"] for edge in node["incomingEdges"]]
        assert ends == [str(number) for number in range(len(ends))]
        keys = [each["key"] for each in node["attrs"]]
        assert len(keys) == len(set(keys))


@every_program
def test_a_partition_is_a_layer_with_its_modules_below(name: str) -> None:
    shown, found = program(name), graph(name)
    layers = found["groupNodeAttributes"]
    assert {layer for layer in layers if "/" not in layer} == {part.name for part in shown.partitions if part.nodes}
    spaces = {node["namespace"] for node in found["nodes"]}
    assert spaces - {""} <= set(layers)
    assert all(layer.rpartition("/")[0] in {"", *layers} for layer in layers)
    bands = {part.index: part.name for part in shown.partitions}
    for node in found["nodes"]:
        item = unfolded(shown).items[int(node["id"])]
        assert node["namespace"].partition("/")[0] == (bands[item.band] if item.kind == "operation" else "")  # type: ignore[index]


def test_a_cut_tells_its_value_and_its_estimator() -> None:
    (first, second) = (node for node in graph("labelled")["nodes"] if node["label"].startswith("cut"))
    told = {each["key"]: each["value"] for each in first["attrs"]}
    assert told["estimator"].startswith("Affine(")
    assert told["value"].endswith("f32[5, 8]")
    assert first["outputsMetadata"][0]["attrs"] == [{"key": "shape", "value": "f32[5, 8]"}]
    assert {each["key"]: each["value"] for each in second["attrs"]}[
        "update lock"
    ] == "the producer waits for the target"


class Twice(nn.Module):
    """Calls a block, another one, and the first again."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.other, self.last, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        block = next(self.children())
        return self.head(self.last(block(self.other(block(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["block", "a/b"])
def test_calls_that_stand_apart_are_layers_of_their_own(name: str) -> None:
    net = dnifx.decouple(Twice(name), ["last"], args=torch.zeros(2, 4))
    layers = list(the_graph(net.program)["groupNodeAttributes"])
    own = f"submod_0/{name.replace('/', '|')}"
    assert layers == ["submod_0", own, f"{own} (call 2)", "submod_1"]
