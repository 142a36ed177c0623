"""The same partitions for another input kind: which nodes match, what becomes of those without a match, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dnifx.errors import CutError
from dnifx.ir import Cut, Edge, Measure, Program, TensorSpec
from dnifx.passes.cuts.same_partitions import (
    SamePartitions,
    around_nodes,
    inherited,
    matching_cut,
    matching_nodes,
    with_order_kept,
)
from dnifx.passes.graph import INSERTED
from tests.passes.programs import Residual, compiled, members

X = torch.randn(3, 6)


def graph_of(function: Callable[..., Any]) -> fx.Graph:
    return fx.Tracer().trace(function)


def place(graph: fx.Graph, **calls: str) -> fx.Graph:
    """Say in which call of which module nodes lie: ``node="path"`` or ``node="path@1"``."""
    for node in graph.nodes:
        if node.name in calls:
            path = calls[node.name].partition("@")[0]
            node.meta["nn_module_stack"] = {calls[node.name]: (path, nn.Module)}
    return graph


def with_dropout(x: Tensor) -> Tensor:
    return torch.cos(torch.tanh(torch.dropout(torch.sin(x), 0.5, True)) + 1)


def without_dropout(x: Tensor) -> Tensor:
    return torch.cos(torch.tanh(torch.sin(x)) + 1)


def test_where_a_node_before_it_is_gone_its_number_decides() -> None:
    found = matching_nodes(graph_of(with_dropout), graph_of(without_dropout))
    assert found == {"sin": "sin", "tanh": "tanh", "add": "add", "cos": "cos"}


def test_each_has_its_own_number() -> None:
    def dropped(x: Tensor) -> Tensor:
        return torch.tanh(torch.dropout(torch.sin(x), 0.5, True)) + torch.tanh(torch.dropout(torch.cos(x), 0.5, True))

    def whole(x: Tensor) -> Tensor:
        return torch.tanh(torch.sin(x)) + torch.tanh(torch.cos(x))

    found = matching_nodes(graph_of(dropped), graph_of(whole))
    assert (found["tanh"], found["tanh_1"]) == ("tanh", "tanh_1")


def test_a_number_gives_no_node_that_is_taken() -> None:
    def dropped(x: Tensor) -> Tensor:
        return torch.tanh(torch.dropout(x, 0.5, True)) + torch.tanh(x)

    def otherwise(x: Tensor) -> Tensor:
        return torch.tanh(x) + torch.tanh(torch.cos(x))

    found = matching_nodes(graph_of(dropped), graph_of(otherwise))
    assert found["tanh"] == "tanh_1"
    assert "tanh_1" not in found


def test_a_number_decides_only_among_equally_many() -> None:
    def once_more(x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(torch.sin(x)) + 1)

    found = matching_nodes(graph_of(with_dropout), graph_of(once_more))
    assert found == {"sin": "sin", "add": "add"}
    assert matching_nodes(graph_of(once_more), graph_of(once_more))["tanh_1"] == "tanh_1"


def test_arguments_come_before_numbers() -> None:
    def one_way(x: Tensor) -> Tensor:
        return torch.tanh(torch.sin(x)) + torch.tanh(torch.cos(x))

    def other_way(x: Tensor) -> Tensor:
        return torch.tanh(torch.cos(x)) * torch.tanh(torch.sin(x))

    found = matching_nodes(graph_of(one_way), graph_of(other_way))
    assert found == {"cos": "cos", "sin": "sin", "tanh": "tanh_1", "tanh_1": "tanh"}


def test_no_node_is_matched_twice() -> None:
    def twice(x: Tensor) -> Tensor:
        return torch.tanh(x) + torch.tanh(x)

    def thrice(x: Tensor) -> Tensor:
        return torch.tanh(x) + torch.tanh(x) * torch.tanh(x)

    assert matching_nodes(graph_of(twice), graph_of(thrice)) == {"tanh": "tanh", "tanh_1": "tanh_1", "add": "add"}


def test_the_call_in_which_a_node_lies_tells_alike_nodes_apart() -> None:
    def twice(x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x + 1) + 1)

    first = place(graph_of(twice), tanh="a", tanh_1="a@1")
    second = place(graph_of(twice), tanh="a@1", tanh_1="a")
    found = matching_nodes(first, second)
    assert (found["tanh"], found["tanh_1"]) == ("tanh_1", "tanh")
    assert "tanh" not in matching_nodes(first, place(graph_of(twice), tanh="b", tanh_1="b"))


def test_what_an_earlier_pass_inserted_is_no_match_and_stands_for_its_node() -> None:
    def cloned(x: Tensor) -> Tensor:
        return torch.tanh(torch.clone(torch.sin(x)))

    def plain(x: Tensor) -> Tensor:
        return torch.tanh(torch.sin(x))

    first = graph_of(cloned)
    next(node for node in first.nodes if node.name == "clone").meta[INSERTED] = "sin"
    assert matching_nodes(first, graph_of(cloned)) == {"sin": "sin", "tanh": "tanh"}
    assert matching_nodes(first, graph_of(plain)) == {"sin": "sin", "tanh": "tanh"}


def test_a_node_without_a_match_belongs_to_the_innermost_call_that_one_partition_had() -> None:
    def chain(x: Tensor) -> Tensor:
        return torch.cos(torch.sin(torch.tanh(x)))

    first = place(graph_of(chain), tanh="block.one", sin="block.two", cos="block.two")
    now = place(graph_of(chain), tanh="block.one", sin="block.two", cos="block.three")
    assert around_nodes(first, now, {"tanh": 0, "sin": 1, "cos": 1}) == {"tanh": 0, "sin": 1}
    assert around_nodes(first, now, {"tanh": 2, "sin": 2, "cos": 2}) == {"tanh": 2, "sin": 2, "cos": 2}
    assert around_nodes(first, now, {"tanh": 0, "sin": 0, "cos": 1}) == {"tanh": 0}


def test_a_module_that_is_one_node_now_has_the_partition_of_its_last_node() -> None:
    def opened(x: Tensor) -> Tensor:
        return torch.sin(torch.tanh(x))

    first = place(graph_of(opened), tanh="block", sin="block")
    now = fx.Graph()
    now.output(now.call_module("block", (now.placeholder("x"),)))
    assert around_nodes(first, now, {"tanh": 0, "sin": 1}) == {"block": 1}


def test_what_has_no_match_follows_its_arguments_and_nothing_flows_back() -> None:
    graph = graph_of(without_dropout)
    partition_of = {"a": 0, "b": 1, "c": 2}
    found = inherited(graph, {"sin": "b"}, {"cos": 2}, partition_of)
    assert [found[name] for name in ("sin", "tanh", "add", "cos", "output")] == [1, 1, 1, 2, 2]
    assert inherited(graph, {"sin": "b"}, {"cos": 0}, partition_of)["cos"] == 1
    with pytest.raises(
        CutError, match="tanh belongs to partition 0 of the first input kind, but reads a value of partition 1"
    ):
        inherited(graph, {"sin": "b", "tanh": "a"}, {}, partition_of)


def drawing(used: str, writes: bool = False) -> Program:
    """Two nodes that draw; one is used, and the second may write."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.create_node("call_function", torch.rand_like, (x,), name="one")
    two = graph.create_node("call_function", torch.rand_like, (x,), name="two")
    graph.output((one,) if used == "one" else (two,))
    spec = (TensorSpec((2,), torch.float32),)
    drawn = Measure(spec, True, random=True)
    written = replace(drawn, writes=("x",)) if writes else drawn
    return Program(nn.Module(), graph=graph, measures={"x": Measure(spec, True), "one": drawn, "two": written})


def test_an_unused_draw_moves_to_where_the_order_of_draws_is_kept() -> None:
    in_order, in_disorder = {"one": 0, "two": 1, "output": 1}, {"one": 1, "two": 0, "output": 1}
    assert with_order_kept(drawing("two"), in_order) == in_order
    assert with_order_kept(drawing("one"), in_disorder) == {"one": 1, "two": 1, "output": 1}
    for program in (drawing("two"), drawing("one", writes=True)):
        with pytest.raises(CutError, match=r"two belongs to partition 0 .* after a node of partition 1"):
            with_order_kept(program, in_disorder)


def test_a_cut_stands_after_the_matching_nodes_or_at_the_end_of_its_partition() -> None:
    found, first = {"a": "a1", "b": "b1"}, {"a": 0, "b": 1, "c": 0}
    partition_of = {"a1": 0, "more": 0, "b1": 1}
    assert matching_cut(Cut("a", ("a", "b")), found, partition_of, first).nodes == ("a1", "b1")
    assert matching_cut(Cut("c", ("c",)), found, partition_of, first).nodes == ("more",)
    edges = (Edge("a", "b"), Edge("a", "c"))
    assert matching_cut(Cut("e", (), edges), found, partition_of, first).edges == (Edge("a1", "b1"),)
    with pytest.raises(CutError, match="the cut gone has no place in the graph of this input kind"):
        matching_cut(Cut("gone", ("gone",)), found, partition_of, first)
    with pytest.raises(CutError, match="the cut e has no place"):
        matching_cut(Cut("e", (), (Edge("c", "a"),)), found, partition_of, first)


@pytest.mark.parametrize("cuts", [["stem"], ["blocks.0"], ["stem", "blocks.1"]])
def test_the_same_graph_has_the_same_partitions(cuts: Any) -> None:
    first = compiled(Residual(), cuts, X, until="legalize")
    again = SamePartitions(first).run(compiled(Residual(), cuts, X, until="measure"))
    assert members(again.partition_of) == members(compiled(Residual(), cuts, X, until="partition").partition_of)
    assert again.cuts == first.cuts
    assert again.levels == {name: first.levels[name] for name in again.levels}
