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
from dnifx.passes.cuts.balance import balanced_cuts, capped, undivided
from dnifx.passes.cuts.places import Place, find_places
from dnifx.passes.graph import captured, computing
from tests.passes.programs import compiled, mlp


@st.composite
def costed(draw: st.DrawFn) -> Program:
    """Draw a graph whose nodes have random costs, sizes and gradients, and some of them weights."""
    graph, model = fx.Graph(), nn.Module()
    nodes = [graph.placeholder("x")]
    measures = {"x": Measure((TensorSpec((2,), torch.float32),), True)}
    for index in range(draw(st.integers(2, 9))):
        chosen = draw(st.lists(st.sampled_from(nodes[-3:]), min_size=1, max_size=2))
        second = chosen[-1]
        if draw(st.integers(0, 3)) > 0:
            model.register_parameter(f"w{index}", nn.Parameter(torch.zeros(1, 1)))
            second = graph.get_attr(f"w{index}")
            measures[second.name] = Measure((TensorSpec((1, 1), torch.float32, True),), True)
        node = graph.create_node("call_function", operator.add, (chosen[0], second), name=f"n{index}")
        spec = TensorSpec((draw(st.integers(1, 6)),), torch.float32, draw(st.integers(0, 5)) > 0)
        measures[node.name] = Measure((spec,), True, flops=draw(st.integers(0, 40)))
        nodes.append(node)
    open_ends = [node for node in nodes[1:] if not node.users]
    graph.output(tuple(draw(st.lists(st.sampled_from(open_ends), min_size=1, unique=True))))
    return Program(model, graph=graph, measures=measures)


def choices(program: Program, places: list[Place], parts: int) -> list[tuple[int, int, tuple[str, ...]]]:
    """Return, for every choice of places, the capped cost of its costliest partition, its price, and the last nodes."""
    nodes = computing(captured(program))
    costs = [program.measures[node.name].cost for node in nodes]
    positions = [place.position for place in places]
    sums = [0, *capped([sum(costs[: end + 1]) for end in (*positions, len(nodes) - 1)], parts)]
    found = []
    for chosen in combinations(range(len(places)), parts - 1):
        ends = [0, *(index + 1 for index in chosen), len(sums) - 1]
        worst = max(sums[stop] - sums[start] for start, stop in pairwise(ends))
        names = tuple(nodes[positions[index]].name for index in chosen)
        found.append((worst, sum(places[index].price for index in chosen), names))
    return found


@given(costed(), st.integers(2, 4), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_choice_is_the_oracles(program: Program, parts: int, slack: float) -> None:
    places, _ = find_places(program, computing(captured(program)), parts - 1)
    if len(places) < parts - 1:
        with pytest.raises(CutError, match=f"cuts={parts} asks for {parts} partitions, but Module can be cut at"):
            balanced_cuts(program, parts, slack)
        return
    found = choices(program, places, parts)
    least = min(worst for worst, _, _ in found)
    cheapest = min(price for worst, price, _ in found if worst <= least * (1 + slack))
    names = tuple(cut.nodes[0] for cut in balanced_cuts(program, parts, slack))
    own = next(choice for choice in found if choice[2] == names)
    assert own[0] <= least * (1 + slack)
    assert own[1] == cheapest


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(2, 5))
def test_what_costs_more_than_its_share_counts_as_its_share(units: list[int], parts: int) -> None:
    ends = [sum(units[: index + 1]) for index in range(len(units))]
    found = [stop - start for start, stop in pairwise([0, *capped(ends, parts)])]
    share = max(found)
    assert found == [min(unit, share) for unit in units]
    assert share == max(units) or (share - 1) * parts <= sum(found) <= share * parts
    if max(units) * parts <= sum(units):
        assert found == units


@pytest.mark.parametrize(
    ("ends", "divided", "chosen"),
    [
        ([1, 2, 4, 6], [0, 0, 1], [0, 1]),  # the costliest partition is just twice what it could be
        ([1, 2, 3, 6, 9], [0, 0, 1, 1], [0, 1, 2, 3]),  # it would be more
        ([1, 2, 4, 8, 12], [0, 0, 1, 2], [0, 1, 2]),  # one block in each is divided rather than two
        ([2, 4, 6], [0, 1], [0, 1]),  # too few places
    ],
)
def test_blocks_stay_whole_where_that_at_most_doubles_the_costliest_partition(
    ends: list[int], divided: list[int], chosen: list[int]
) -> None:
    places = [Place(position, each, 1) for position, each in enumerate(divided)]
    assert undivided(places, ends, 3) == chosen


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


@pytest.mark.parametrize("parts", [1, 0, -3])
def test_fewer_than_two_partitions_are_no_cut(parts: int) -> None:
    with pytest.raises(CutError, match=f"cuts={parts} asks for {parts} partition.s.; give 2 or more, or name modules"):
        dnifx.decouple(mlp(4, 4, 2), parts, args=(torch.randn(2, 4),))


def test_more_partitions_than_places_are_refused_with_how_many_there_are() -> None:
    text = r"cuts=9 asks for 9 partitions, but Sequential can be cut at 2 places: each partition needs a layer .*\nask for 3 part"
    with pytest.raises(CutError, match=text):
        dnifx.decouple(mlp(4, 4, 4, 2), 9, args=(torch.randn(2, 4),))


def test_the_cuts_are_named_by_the_largest_value_that_crosses() -> None:
    program = compiled(mlp(4, 16, 16, 2), 3, torch.randn(2, 4))
    assert [cut.level for cut in program.cuts] == [0, 1]
    assert len({cut.name for cut in program.cuts}) == 2
    assert all(boundary.name in {cut.name for cut in program.cuts} for boundary in program.boundaries)


def test_a_measure_decides_and_nothing_else() -> None:
    program = compiled(mlp(*[8] * 5), 2, torch.randn(2, 8), until="cuts")
    heavy = {name: replace(item, flops=item.flops + 10**6 * (name == "_0")) for name, item in program.measures.items()}
    cuts = balanced_cuts(replace(program, measures=heavy), 2, 0.0)
    assert cuts[0].nodes == ("_1",)
