"""Partitions: each node is in one, they are convex and acyclic, and cut where asked; errors draw the way round a cut."""

import operator
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networkx.utils import UnionFind
from torch import Tensor, fx, nn

import dnifx
from dnifx.errors import CutError, PassError
from dnifx.ir import Cut, Edge, Measure, Program, TensorSpec
from dnifx.passes.cuts.partition import FormPartitions, gradient_edges, without_cycles
from dnifx.passes.graph import captured
from tests.passes.programs import Residual, compiled, members, mlp

X = torch.randn(3, 6)


@st.composite
def programs(draw: st.DrawFn, plain: bool = False) -> Program:
    """Draw a graph of additions, some without a gradient or random, and cuts after single nodes of it."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    measures = {"x": measure(False)}
    for index in range(draw(st.integers(2, 9))):
        chosen = draw(st.lists(st.sampled_from(nodes[-4:]), min_size=1, max_size=2))
        node = graph.create_node("call_function", operator.add, (chosen[0], chosen[-1]), name=f"n{index}")
        measures[node.name] = measure(plain or draw(st.integers(0, 4)) > 0, not plain and draw(st.integers(0, 5)) == 0)
        nodes.append(node)
    open_ends = [node for node in nodes[1:] if not node.users]
    graph.output(tuple(open_ends if plain else open_ends[-2:]))
    names = [node.name for node in nodes[1:] if any(user.op != "output" for user in node.users)]
    cuts = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)) if names else ["n0"]
    ordered = [name for name in measures if name in cuts]
    return Program(nn.Module(), graph=graph, measures=measures, cuts=tuple(Cut(name, (name,)) for name in ordered))


def measure(gradient: bool, random: bool = False) -> Measure:
    return Measure((TensorSpec((2, 2), torch.float32, gradient),), True, random=random)


def flow(program: Program) -> nx.DiGraph:
    """Return the graph of the nodes that have a partition."""
    found = nx.DiGraph()
    for node in captured(program).nodes:
        if node.op != "placeholder":
            found.add_node(node.name)
            found.add_edges_from((node.name, user.name) for user in node.users)
    return found


@given(programs())
def test_every_node_has_one_home_and_homes_are_numbered_in_an_order_that_runs(program: Program) -> None:
    partition_of = FormPartitions().run(program).partition_of
    graph = flow(program)
    assert set(partition_of) == set(graph)
    assert set(partition_of.values()) == set(range(max(partition_of.values()) + 1))
    assert all(partition_of[source] <= partition_of[target] for source, target in graph.edges)
    assert partition_of["output"] == max(partition_of.values()), "the loss comes last"


@given(programs())
def test_partitions_are_convex_and_their_graph_is_acyclic(program: Program) -> None:
    partition_of = FormPartitions().run(program).partition_of
    graph = flow(program)
    quotient = nx.DiGraph(
        (partition_of[a], partition_of[b]) for a, b in graph.edges if partition_of[a] != partition_of[b]
    )
    assert nx.is_directed_acyclic_graph(quotient)
    for inside in members(partition_of).values():
        after = set().union(*(nx.descendants(graph, name) for name in inside)) - inside
        before = set().union(*(nx.ancestors(graph, name) for name in inside)) - inside
        assert not after & before, f"a value leaves {inside} and comes back"


@given(programs())
def test_random_numbers_are_drawn_in_the_order_of_the_model(program: Program) -> None:
    partition_of = FormPartitions().run(program).partition_of
    drawn = [partition_of[name] for name, item in program.measures.items() if item.random]
    assert drawn == sorted(drawn)


@given(programs(plain=True))
def test_a_cut_separates_its_node_from_all_that_reads_it(program: Program) -> None:
    partition_of = FormPartitions().run(program).partition_of
    graph = flow(program)
    for cut in program.cuts:
        for user in graph.successors(cut.name):
            assert partition_of[cut.name] < partition_of[user] or user == "output", (
                f"{user} lies in the partition of {cut.name}"
            )


def test_a_value_that_goes_round_is_cut_with_the_module() -> None:
    program = compiled(Residual(), ["blocks.0"], X, until="partition")
    assert members(program.partition_of) == {
        0: {"stem", "blocks_0_linear", "relu"},
        1: {"blocks_1_linear", "relu_1", "add", "head", "output"},
    }


def test_independent_branches_are_partitions_of_their_own() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.left(x) * self.right(x))
            return result

    program = compiled(Branches(), ["left", "right"], X, until="partition")
    assert members(program.partition_of) == {0: {"left"}, 1: {"right"}, 2: {"mul", "head", "output"}}


def test_branches_that_draw_in_turn_are_one_partition() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = (nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) for _ in range(2))
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = x, x
            for one, other in zip(self.left, self.right, strict=True):
                left, right = self.drop(one(left)), self.drop(other(right))
            result: Tensor = self.head(torch.tanh(left) * torch.sin(right))
            return result

    model = Turns()
    program = compiled(model, ["tanh", "sin"], X, until="partition")
    assert set(program.partition_of.values()) == {0, 1}
    net = dnifx.decouple(model, ["tanh", "sin"], args=(X,))
    torch.manual_seed(5)
    expected = model(X)
    torch.manual_seed(5)
    assert torch.equal(net(X), expected)


def test_parameters_are_read_where_they_are_used() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight) @ self.weight

    program = compiled(Reads(), ["tanh"], X, until="partition")
    graph = captured(program)
    for node in graph.nodes:
        if node.op == "get_attr":
            assert {program.partition_of[user.name] for user in node.users} == {program.partition_of[node.name]}


def test_edges_that_separate_cut_exactly_there() -> None:
    edges = [Edge("stem", "blocks.0"), Edge("stem", "add")]
    program = compiled(Residual(), edges, X, until="partition")
    assert members(program.partition_of)[0] == {"stem"}
    assert [str(cut) for cut in (cut.name for cut in program.cuts)] == ["stem -> blocks.0", "stem -> add"]


def test_an_edge_that_a_value_goes_round_is_refused_with_a_drawing() -> None:
    with pytest.raises(CutError) as caught:
        compiled(Residual(), [Edge("blocks.0", "blocks.1")], X, until="partition")
    text = str(caught.value)
    assert "the cut relu -> blocks_1_linear does not separate the model" in text or "blocks.0 -> blocks.1" in text
    assert "the model: a value goes round it" in text
    cut, round_ = text.splitlines()[1:3]
    assert cut == "  cut:    stem -> blocks_0_linear -> relu ==X==> blocks_1_linear -> relu_1 -> add"
    assert round_ == "  round:  stem -----> add"
    assert "also cut dnifx.Edge('stem', 'add'), or name the module" in text


def test_the_remedy_that_the_refusal_names_works() -> None:
    edges = [Edge("blocks.0", "blocks.1"), Edge("stem", "add")]
    model = Residual()
    net = dnifx.decouple(model, edges, args=(X,))
    assert torch.equal(net(X), model(X))
    assert {value for boundary in net.boundaries for value in boundary.values} == {"relu", "stem"}


class WritesThroughAView(nn.Module):
    """Writes to its input through a view; what reads the input afterwards reads no value of the write."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        column = x[:, 0].add_(1)
        h = self.first(x)
        result: Tensor = self.second(h) + column.unsqueeze(1)
        return result


class WritesABuffer(nn.Module):
    """Updates a buffer, reads it, and uses the update once more behind the cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        update = self.get_buffer("mean").add_(x.mean(0))
        result: Tensor = self.second(h - self.get_buffer("mean")) + update
        return result


@pytest.mark.parametrize("kind", [WritesThroughAView, WritesABuffer])
def test_a_write_to_an_input_or_buffer_keeps_its_turn(kind: type[nn.Module]) -> None:
    expected, model = kind(), kind()
    program = compiled(model, ["first"], X.clone(), until="legalize")
    assert len(program.partitions) == 2, "the cut is there"
    net = dnifx.decouple(model, ["first"], args=(X.clone(),))
    for _ in range(2):
        assert torch.equal(net(X.clone()), expected(X.clone()))
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), expected.buffers(), strict=True))


class Sized(nn.Module):
    """A chain of layers that read a size of what comes in, and use it for a branch, a scale or a reshape, or not at all."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.use = nn.ModuleList(nn.Linear(6, 6) for _ in range(6)), use

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            size = x.shape[-1]
            if self.use == "branch":
                x = layer(x if int(size) % 2 == 0 else -x)
            elif self.use == "scale":
                x = layer(x) / size
            elif self.use == "reshape":
                x = layer(x.reshape(-1, 2, size // 2).flatten(1))
            else:
                x = layer(x) * (1 if list(range(size)) else 2)
        return x


@pytest.mark.parametrize("use", ["branch", "scale", "reshape", "nothing"])
@pytest.mark.parametrize("cuts", [["layers.1", "layers.2", "layers.4"], ["layers.0", "layers.4"], ["layers.[0-4]"]])
def test_what_is_read_of_sizes_joins_no_partitions(use: str, cuts: list[str]) -> None:
    model = Sized(use)
    net = dnifx.decouple(model, cuts, args=(X,), gradient="oracle")
    assert len(net.boundaries) == (len(cuts) if len(cuts) > 1 else 5)
    assert torch.equal(net(X), model(X))


@given(programs())
def test_a_cut_that_a_gradient_crosses_is_never_lost(program: Program) -> None:
    formed = FormPartitions().run(program)
    for cut in program.cuts:
        for source, user in gradient_edges(program, cut):
            assert formed.partition_of[source.name] < formed.partition_of[user.name], f"{cut.name} is lost"


def test_an_unused_draw_between_two_others_joins_no_partitions() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            late = torch.dropout(self.third(x), 0.5, True)
            torch.rand(3)
            h = torch.relu(torch.dropout(self.first(x), 0.5, True))
            result: Tensor = self.second(h) + late
            return result

    net = dnifx.decouple(Draws(), ["relu"], args=(X,), gradient="oracle")
    assert "relu" in {boundary.name for boundary in net.boundaries}


def test_a_cut_whose_sides_are_one_partition_is_an_error_that_says_what_joins_them() -> None:
    program = compiled(mlp(6, 6, 6, 2), ["0", "2"], X, until="partition")
    joined = UnionFind(program.partition_of)
    joined.union("_3", "_0")
    with pytest.raises(
        CutError, match=r"the cut 0 cannot be made: _1 .* is behind it.* partition of _0 .*_1 .* runs before _2 "
    ):
        without_cycles(program, joined)
    joined.union("_1", "_0")
    with pytest.raises(CutError, match=r"the cut 0 cannot be made: _1 .*, which is before it; cut elsewhere, or leave"):
        without_cycles(program, joined)


def test_dead_code_makes_no_partition() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            self.unused(h)
            result: Tensor = self.second(h)
            return result

    program = compiled(Dead(), ["relu"], X, until="partition")
    assert set(program.partition_of.values()) == {0, 1}


def test_a_pass_that_lets_a_value_flow_back_is_found_out() -> None:
    program = compiled(mlp(6, 6, 2), ["0"], X, until="partition")
    broken: Any = dict(program.partition_of)
    broken["_0"] = 5
    with pytest.raises(PassError, match="a value flows back to an earlier partition: _0 -> _1"):
        FormPartitions().check(Program(program.model, graph=program.graph, partition_of=broken))
    del broken["_0"]
    with pytest.raises(PassError, match="gave node _0 no partition"):
        FormPartitions().check(Program(program.model, graph=program.graph, partition_of=broken))
