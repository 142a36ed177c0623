"""The drawing of a cut edge and the way round it: which cut edge is drawn, where both ways meet, what is no way."""

import operator
from collections.abc import Sequence

import networkx as nx
import pytest
from torch import fx

from dnifx.ir import Edge
from dnifx.passes.cuts.drawing import draw, way_round

LEVELS = dict.fromkeys("abcdef", 0)


def graph_of(*edges: str) -> fx.Graph:
    """Return a graph of nodes in alphabetical order, with an edge for each pair of letters."""
    graph = fx.Graph()
    nodes = {"x": graph.placeholder("x")}
    for name in sorted({letter for edge in edges for letter in edge}):
        sources = [nodes[edge[0]] for edge in edges if edge[1] == name] or [nodes["x"]]
        nodes[name] = graph.create_node(
            "call_function", operator.add, (sources[0], sources[1] if len(sources) > 1 else 1), name=name
        )
    graph.output(tuple(node for node in nodes.values() if not node.users))
    return graph


def drawn(graph: fx.Graph, uncut: str, cuts: Sequence[str], **levels: int) -> list[str]:
    """Return the two lines of a drawing."""
    text = way_round(graph, Edge(*uncut), [Edge(*edge) for edge in cuts], {**LEVELS, **levels})
    return [line.strip() for line in text.splitlines()[1:3]]


def test_both_ways_are_drawn_from_where_they_part_to_where_they_meet() -> None:
    graph = graph_of("ab", "bc", "cd", "ad")
    assert drawn(graph, "ad", ["bc"]) == ["cut:    a -> b ==X==> c -> d", "round:  a -----> d"]


def test_a_cut_right_where_the_ways_part_and_one_right_where_they_meet() -> None:
    graph = graph_of("ab", "bc", "ac")
    assert drawn(graph, "ac", ["ab"]) == ["cut:    a ==X==> b -> c", "round:  a -----> c"]
    assert drawn(graph, "ac", ["bc"]) == ["cut:    a -> b ==X==> c", "round:  a -----> c"]


def test_of_several_cut_edges_the_one_of_the_same_level_behind_the_fork_is_drawn() -> None:
    graph = graph_of("ab", "bc", "cd", "de", "ce")
    assert drawn(graph, "ce", ["ab", "cd"]) == ["cut:    c ==X==> d -> e", "round:  c -----> e"]
    graph = graph_of("ab", "bc", "cd", "ad")
    assert drawn(graph, "ad", ["bc", "cd"], b=1, c=0) == ["cut:    a -> b -> c ==X==> d", "round:  a -----> d"]
    assert drawn(graph, "ad", ["bc", "cd"], b=1, c=1) == ["cut:    a -> b ==X==> c -> d", "round:  a -----> d"]


def test_where_none_has_the_same_level_the_first_behind_the_fork_is_drawn() -> None:
    graph = graph_of("ab", "bc", "cd", "ad", "ef")
    assert drawn(graph, "ad", ["ef", "bc"], b=1) == ["cut:    a -> b ==X==> c -> d", "round:  a -----> d"]


def test_ways_that_meet_only_in_the_output_are_drawn_to_it() -> None:
    graph = graph_of("ab", "bc", "ad")
    assert drawn(graph, "ad", ["bc"]) == ["cut:    a -> b ==X==> c -> output", "round:  a -----> d -> output"]


def test_a_cut_that_does_not_lie_behind_the_fork_is_drawn_by_its_ends() -> None:
    graph = graph_of("ab", "cd", "bf", "df")
    assert drawn(graph, "bf", ["cd"]) == ["cut:    c ==X==> d -> f", "round:  b -----> f"]


def test_the_remedy_names_the_edge_and_the_module() -> None:
    text = way_round(graph_of("ab", "bc", "ac"), Edge("a", "c"), [Edge("b", "c")], LEVELS)
    assert text.startswith("the cut b -> c does not separate the model: a value goes round it\n")
    assert text.endswith(
        "also cut dnifx.Edge('a', 'c'), or name the module 'b': a cut after a module cuts every value that crosses there"
    )


@pytest.mark.parametrize(("ends", "expected"), [("aa", "a"), ("ac", "a -> c"), ("ca", "c"), ("bd", "d")])
def test_a_way_between_two_nodes(ends: str, expected: str) -> None:
    flow = nx.DiGraph(["ab", "bc", "ac", "ed"])
    assert draw(flow, *ends) == expected
