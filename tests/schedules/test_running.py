"""Places in the schedule of a trainer: carried out, or refused."""

import pytest
import torch
from torch import nn

import dnifx
from dnifx import schedules
from dnifx.errors import ScheduleError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer

TEXT = "F0 S0 B0 U0 F1 B1 T0 M0 U1"


def net() -> DecoupledModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return dnifx.decouple(model, ["1"], args=(torch.randn(6, 4),), loss=nn.functional.cross_entropy)


def trainer(schedule: str | schedules.Period | object) -> Trainer:
    return net().trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), schedule)


@pytest.mark.parametrize("word", ["F1@meta", "F1@cuda:1", "B0@cpu/1", "U0/0", "M0@cuda", "F1@mps"])
def test_a_place_that_cannot_be_run_is_refused(word: str) -> None:
    text = " ".join(word if each == word[:2] else each for each in TEXT.split())
    with pytest.raises(ScheduleError, match="leave them out") as caught:
        trainer(text)
    assert len(str(caught.value)) < 600


def test_a_rank_needs_a_trainer_over_ranks() -> None:
    with pytest.raises(ScheduleError, match='places="ranks"'):
        trainer(" ".join(f"{each}@rank0" for each in TEXT.split()))


def test_a_partition_in_two_places_is_refused() -> None:
    program = net().program
    with pytest.raises(ScheduleError, match="name the same place"):
        trainer(schedules.placed(schedules.sequential(program), program, ["cpu", "meta"]))


def test_the_place_where_the_partition_is_changes_nothing() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    losses = [
        trainer(text).step(x, target=y).loss for text in (TEXT, TEXT.replace("F1", "F1@cpu").replace("B0", "B0@cpu:0"))
    ]
    assert losses[0] is not None
    assert losses[1] is not None
    assert torch.equal(losses[0], losses[1])
