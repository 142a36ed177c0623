"""The integer form of cuts, against an oracle that tries every choice."""

import operator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import dnifx
from dnifx.errors import CutError
from dnifx.ir import Measure, Program, TensorSpec
from dnifx.passes.cuts.balance import balanced_cuts
from dnifx.passes.graph import captured
from tests.passes.programs import compiled, mlp


@st.composite
def costed(draw: st.DrawFn) -> Program:
    """Draw a graph whose nodes have random costs, sizes and gradients."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    measures = {"x": Measure()}
    for index in range(draw(st.integers(2, 8))):
        chosen = draw(st.lists(st.sampled_from(nodes[-3:]), min_size=1, max_size=2))
        node = graph.create_node("call_function", operator.add, (chosen[0], chosen[-1]), name=f"n{index}")
        spec = TensorSpec((draw(st.integers(1, 6)),), torch.float32, draw(st.integers(0, 5)) > 0)
        measures[node.name] = Measure((spec,), True, flops=draw(st.integers(0, 40)))
        nodes.append(node)
    open_ends = [node for node in nodes[1:] if not node.users]
    graph.output(tuple(draw(st.lists(st.sampled_from(open_ends), min_size=1, unique=True))))
    return Program(nn.Module(), graph=graph, measures=measures)


def oracle(program: Program, parts: int, slack: float) -> tuple[float, int] | None:
    """Return the least bottleneck, and the fewest bytes among the choices within the slack of it; None without a choice."""
    nodes = [node for node in captured(program).nodes if node.op == "call_function"]
    places = {node: place for place, node in enumerate(nodes)}
    costs = [program.measures[node.name].cost for node in nodes]

    def last(node: fx.Node) -> int:
        return max((places.get(user, len(nodes) - 1) for user in node.users), default=places[node])

    def crossing(place: int) -> list[Measure]:
        return [program.measures[node.name] for node in nodes if places[node] <= place < last(node)]

    def flows(place: int) -> bool:
        sources = (node for node in nodes[: place + 1] if program.measures[node.name].requires_grad)
        return any(places.get(user, 0) > place for node in sources for user in node.users)

    allowed = [place for place in range(len(nodes) - 1) if flows(place)]
    choices: list[tuple[int, int]] = []
    for chosen in combinations(allowed, parts - 1):
        ends = [0, *(place + 1 for place in chosen), len(nodes)]
        bottleneck = max(sum(costs[start:stop]) for start, stop in pairwise(ends))
        choices.append((bottleneck, sum(measure.bytes for place in chosen for measure in crossing(place))))
    if not choices:
        return None
    best = min(bottleneck for bottleneck, _ in choices)
    return best, min(size for bottleneck, size in choices if bottleneck <= best * (1 + slack))


def chosen_figures(program: Program, ends: list[str]) -> tuple[int, int]:
    """Return the bottleneck and the bytes of a choice of last nodes."""
    nodes = [node for node in captured(program).nodes if node.op == "call_function"]
    level, costs, crossing = 0, [0], 0
    levels: dict[fx.Node, int] = {}
    for node in nodes:
        levels[node] = level
        costs[-1] += program.measures[node.name].cost
        if node.name in ends:
            level += 1
            costs.append(0)
    for node in nodes:
        furthest = max((levels.get(user, len(ends)) for user in node.users), default=levels[node])
        crossing += (furthest - levels[node]) * program.measures[node.name].bytes
    return max(costs), crossing


@given(costed(), st.integers(2, 4), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_choice_is_the_oracles(program: Program, parts: int, slack: float) -> None:
    expected = oracle(program, parts, slack)
    if expected is None:
        with pytest.raises(CutError, match=f"cuts={parts} asks for {parts} partitions, but Module can be cut at"):
            balanced_cuts(program, parts, slack)
        return
    cuts = balanced_cuts(program, parts, slack)
    assert len(cuts) == parts - 1
    bottleneck, size = chosen_figures(program, [cut.nodes[0] for cut in cuts])
    assert bottleneck <= expected[0] * (1 + slack)
    assert size == expected[1]


@given(costed())
def test_without_slack_no_choice_has_a_cheaper_costliest_partition(program: Program) -> None:
    expected = oracle(program, 3, 0.0)
    if expected is not None:
        cuts = balanced_cuts(program, 3, 0.0)
        assert chosen_figures(program, [cut.nodes[0] for cut in cuts])[0] == expected[0]


def test_equal_layers_are_shared_out_evenly() -> None:
    program = compiled(mlp(*[8] * 13), 4, torch.randn(2, 8))
    assert [len(partition.parameters) for partition in program.partitions] == [6, 6, 6, 6]
    assert len(program.boundaries) == 3


def test_cost_counts_and_not_the_number_of_modules() -> None:
    program = compiled(mlp(8, 8, 8, 8, 512, 8), 2, torch.randn(2, 8))
    assert [len(partition.parameters) for partition in program.partitions] == [8, 2]


def test_a_narrow_place_within_the_slack_is_taken() -> None:
    class Waist(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.open, self.last = (
                nn.Linear(64, 64),
                nn.Linear(64, 2),
                nn.Linear(2, 64),
                nn.Linear(64, 64),
            )

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.open(self.narrow(self.wide(x))))
            return result

    program = compiled(Waist(), 2, torch.randn(2, 64))
    assert [boundary.name for boundary in program.boundaries] == ["narrow"]


def test_no_cut_where_a_later_node_writes_to_what_crosses_or_takes_it_apart() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.add_(1)
            halves = torch.chunk(h * 2, 2, 1)
            result: Tensor = self.second(torch.cat((halves[1], halves[0]), 1))
            return result

    program = compiled(Written(), 2, torch.randn(2, 8), until="cuts")
    names = [cut.nodes[0] for cut in balanced_cuts(program, 5, 9.0)]
    assert names == ["add_", "mul", "getitem_1", "cat"]
    with pytest.raises(CutError, match="ask for 5 or fewer"):
        balanced_cuts(program, 6, 9.0)


@pytest.mark.parametrize("parts", [1, 0, -3])
def test_fewer_than_two_partitions_are_no_cut(parts: int) -> None:
    with pytest.raises(CutError, match=f"cuts={parts} asks for {parts} partition.s.; give 2 or more, or name modules"):
        dnifx.decouple(mlp(4, 4, 2), parts, args=(torch.randn(2, 4),))


def test_more_partitions_than_places_are_refused_with_how_many_there_are() -> None:
    with pytest.raises(
        CutError, match="cuts=9 asks for 9 partitions, but Sequential can be cut at 2 places only; ask for 3"
    ):
        dnifx.decouple(mlp(4, 4, 2), 9, args=(torch.randn(2, 4),))


def test_the_cuts_are_named_by_the_largest_value_that_crosses() -> None:
    program = compiled(mlp(4, 16, 16, 2), 3, torch.randn(2, 4))
    assert [cut.level for cut in program.cuts] == [0, 1]
    assert len({cut.name for cut in program.cuts}) == 2
    assert all(boundary.name in {cut.name for cut in program.cuts} for boundary in program.boundaries)


def test_a_measure_decides_and_nothing_else() -> None:
    program = compiled(mlp(*[8] * 5), 2, torch.randn(2, 8), until="cuts")
    heavy = {name: replace(item, flops=item.flops + 10**6 * (name == "_0")) for name, item in program.measures.items()}
    cuts = balanced_cuts(replace(program, measures=heavy), 2, 0.0)
    assert cuts[0].nodes == ("_0",)
