"""Which partition runs on which rank."""

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx import schedules
from dnifx.errors import PlaceError
from dnifx.estimators import Suffix
from dnifx.ir import Program
from dnifx.passes.pipeline import run_passes
from dnifx.passes.place import PlacePartitions, balanced, divided, placed_ranks


def program(model: nn.Module, cuts: Any, *shape: int, **options: Any) -> Program:
    torch.manual_seed(0)
    return dnifx.decouple(model, cuts, args=(torch.randn(4, *shape),), loss=nn.functional.mse_loss, **options).program


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_the_costliest_rank_costs_as_little_as_possible(costs: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(costs)))
    ranks = divided(costs, range(len(costs) + 1), count)
    assert sorted(set(ranks)) == list(range(count))
    assert list(ranks) == sorted(ranks)
    found = max(sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == each) for each in range(count))
    ways = ([0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), count - 1))
    assert found == min(max(sum(costs[start:end]) for start, end in pairwise(edges)) for edges in ways)


def test_estimators_count_in_the_balance() -> None:
    cuts = ["1", "3", "5"]
    plain = program(mlp(8, 32, 32, 32, 8), cuts, 8, gradient="zero")
    costly = program(
        mlp(8, 32, 32, 32, 8), cuts, 8, gradient={"1": dnifx.estimators.Synthetic(hidden=2, width=512), "*": "zero"}
    )
    assert balanced(plain, 2) == (0, 0, 1, 1)
    assert balanced(costly, 2) == (0, 1, 1, 1)


def test_the_pass_adds_ranks_and_transfers() -> None:
    found = run_passes(program(mlp(8, 8, 8), ["1"], 8), [PlacePartitions("0,1")])
    assert found.schedule is not None
    assert schedules.ranks_of(found.schedule, found) == (0, 1)
    assert "SEND_F0@rank0>rank1" in str(found.schedule)
    assert str(PlacePartitions()) == "place"
    balanced_over_two = run_passes(program(mlp(8, 8, 8), ["1"], 8), [PlacePartitions()])
    assert balanced_over_two.schedule == found.schedule
    assert str(PlacePartitions("0,1")) == "place{places='0,1'}"
    locked = program(mlp(8, 8, 8), ["1"], 8)
    waiting = schedules.backprop(locked)
    assert waiting != locked.schedule
    placed = run_passes(replace(locked, schedule=waiting), [PlacePartitions("0,1")])
    assert placed.schedule == schedules.transferred(waiting, locked, (0, 1)) != found.schedule


@pytest.mark.parametrize("places", ["0,0,1", [0, 0, 1], {"submod_0": 0, "submod_1": 0, "submod_2": 1}])
def test_ranks_are_given_by_hand(places: Any) -> None:
    assert placed_ranks(places, program(mlp(8, 8, 8, 8), ["1", "3"], 8), 2) == (0, 0, 1)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ("ranks", "3 partitions give work for 3 ranks, not for 4"),
        ([0, 1], "2 ranks were given for 3 partitions"),
        ({"submod_0": 0}, "submod_1"),
        (["cuda:0", "cuda:1", "cuda:1"], "torchrun"),
        ("0,1,x", "torchrun"),
        ([0, 1, 1], "2 of 4 ranks"),
        ([0, 1, -1], "torchrun"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(places: Any, said: str) -> None:
    with pytest.raises(PlaceError, match=said) as caught:
        placed_ranks(places, program(mlp(8, 8, 8, 8), ["1", "3"], 8), 4)
    assert len(str(caught.value)) < 600


class Tied(nn.Module):
    """Three layers; the first and the last have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return out


class Aside(nn.Module):
    """A gate of the input goes around the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.gate = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.relu(self.gate(x))
        out: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x))))) * gate
        return out


class Twice(nn.Module):
    """One normalisation without parameters, called in two partitions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.last(torch.tanh(self.norm(self.first(x)))))
        return out


@pytest.mark.parametrize(
    ("model", "cuts", "options", "said"),
    [
        (Twice(), ["tanh"], {}, "share the buffer 'norm."),
        (mlp(8, 8, 8), ["1"], {"gradient": "direct_feedback"}, "output's error"),
        (mlp(8, 8, 8), ["1"], {"inputs": "synthetic"}, "synthetic input models"),
    ],
)
def test_what_cannot_run_on_different_ranks_is_refused(model: nn.Module, cuts: Any, options: Any, said: str) -> None:
    made = program(model, cuts, 8, **options)
    ranks = [0] * (len(made.partitions) - 1) + [1]
    for places in (ranks, "ranks"):
        with pytest.raises(PlaceError, match=said) as caught:
            placed_ranks(places, made, len(made.partitions) if places == "ranks" else 2)
        assert len(str(caught.value)) < 600


def test_what_a_suffix_reads_beside_its_values_stays_on_its_rank() -> None:
    made = program(Aside(), ["relu", "tanh", "tanh_1"], 8, gradient="suffix")
    assert placed_ranks([0, 0, 0, 1], made, 2) == (0, 0, 0, 1)
    with pytest.raises(PlaceError, match="the suffix on 'tanh_1' reads 'relu': submod_0 and submod_2 cannot"):
        placed_ranks([0, 0, 1, 1], made, 2)
    assert placed_ranks([0, 1, 1], program(mlp(8, 8, 8, 4), ["1", "3"], 8, gradient="suffix"), 2) == (0, 1, 1)


def test_what_shares_parameters_is_placed_together_where_there_is_another_way() -> None:
    made = program(nn.Sequential(Tied(), nn.Tanh(), nn.Linear(8, 8)), ["0.first", "0.middle", "1"], 8)
    assert placed_ranks("ranks", made, 2) == (0, 0, 0, 1)
    assert placed_ranks([0, 0, 1, 1], made, 2) == (0, 0, 1, 1)
    assert placed_ranks("ranks", made, 4) == (0, 1, 2, 3)
    assert placed_ranks("ranks", program(Tied(), ["tanh", "tanh_1"], 8), 2) in ((0, 1, 1), (0, 0, 1))


class Read(nn.Module):
    """A language model whose readout is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(9, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.embedding(x)) @ self.embedding.weight.T


def test_a_suffix_copies_a_weight_of_its_own_rank_or_gets_it_sent() -> None:
    loss = nn.CrossEntropyLoss()
    made = dnifx.decouple(
        Read(),
        ["blocks.0", "blocks.1"],
        args=(torch.arange(9),),
        loss=loss,
        gradient=Suffix(blocks=0, readout="shared"),
    ).program
    sent = {}
    for ranks in ([0, 0, 1], [0, 1, 2], [1, 0, 0]):
        placed = run_passes(made, [PlacePartitions(",".join(map(str, ranks)), len(set(ranks)))])
        sent[tuple(ranks)] = [each for each in str(placed.schedule).split() if each.startswith("SEND_S")]
    assert sent == {(0, 0, 1): [], (0, 1, 2): ["SEND_S1@rank2>rank1"], (1, 0, 0): []}
