"""What a model keeps in attributes goes into the trainer's state dict: a resumed run equals one without a break."""

import io
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.errors import StateError
from dnifx.runtime.training.trainer import Trainer
from tests.random_models.stateful import WIDTH, Attached, AveragesInPlace, Block, Fills, Stateful, kinds, state_of


def trainer_of(chosen: list[type[nn.Module]], seed: int) -> Trainer:
    torch.manual_seed(seed)
    net = dnifx.decouple(Stateful(chosen), ["first"], args=(torch.randn(3, WIDTH),), loss=nn.MSELoss())
    return net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.01))


def train(trainer: Trainer, begin: int, end: int) -> None:
    for step in range(begin, end):
        torch.manual_seed(step)
        trainer.step(torch.randn(3, WIDTH), target=torch.randn(3, 2))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=8)
@given(kinds, st.integers(1, 4), st.booleans())
def test_a_resumed_run_equals_one_without_a_break(chosen: list[type[nn.Module]], break_at: int, used: bool) -> None:
    """The state goes through a file, into another model, of other weights, which may have run before."""
    whole, broken, other = trainer_of(chosen, 0), trainer_of(chosen, 0), trainer_of(chosen, 1)
    train(whole, 0, 6)
    train(broken, 0, break_at)
    if used:
        train(other, 7, 9)
    other.load_state_dict(through_a_file(broken.state_dict()))
    train(other, break_at, 6)
    assert state_of(whole.net.original) == state_of(other.net.original)
    for one, two in zip(whole.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(one, two)


class Term(Block):
    """A term of the loss, and a state with a graph."""

    def begin(self) -> None:
        self.term: Any = None
        self.state = torch.zeros(WIDTH)

    def add(self, h: Tensor) -> Tensor:
        self.term = h.square().mean()
        self.state = 0.5 * self.state.detach() + h
        return self.state


def test_a_state_is_saved_without_its_graph_and_a_term_of_the_loss_is_not_saved() -> None:
    net = dnifx.decouple(Stateful([Term]), ["first"], args=(torch.randn(3, WIDTH),), loss=nn.MSELoss())
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    train(trainer, 0, 2)
    (part,) = trainer.state_dict()["parts"]
    assert list(part["attributes"]) == ["self.blocks.0.state"]
    assert not part["attributes"]["self.blocks.0.state"].requires_grad


def test_containers_and_tensors_that_others_hold_stay_the_same_objects() -> None:
    trainer = trainer_of([AveragesInPlace, Fills], 0)
    train(trainer, 0, 2)
    saved = through_a_file(trainer.state_dict())
    blocks: Any = trainer.net.original.blocks
    mean, fills = blocks
    held = mean.mean, fills.past
    train(trainer, 2, 4)
    trainer.load_state_dict(saved)
    assert mean.mean is held[0]
    assert fills.past is held[1]
    assert len(held[1]) == 2


def test_what_cannot_be_saved_or_has_no_place_is_told() -> None:
    trainer = trainer_of([Attached], 0)
    train(trainer, 0, 1)
    state = through_a_file(trainer.state_dict())
    block: Any = trainer.net.original.get_submodule("blocks.0")
    block.state = (number for number in range(1))
    with pytest.raises(StateError, match=r"self.blocks.0.state holds a generator, which cannot be saved"):
        trainer.state_dict()
    state["parts"][0]["attributes"]["self.blocks.7.state"] = 1
    with pytest.raises(StateError, match=r"the saved state has self.blocks.7.state, and Stateful has no place for it"):
        trainer.load_state_dict(state)


def test_a_deque_is_saved_as_a_list_and_keeps_its_length() -> None:
    trainer = trainer_of([Attached], 0)
    train(trainer, 0, 1)
    block: Any = trainer.net.original.get_submodule("blocks.0")
    block.state = deque([torch.ones(1), torch.zeros(1)], maxlen=2)
    saved = through_a_file(trainer.state_dict())
    block.state.append(torch.ones(1))
    trainer.load_state_dict(saved)
    assert (list(block.state), block.state.maxlen) == ([torch.ones(1), torch.zeros(1)], 2)
