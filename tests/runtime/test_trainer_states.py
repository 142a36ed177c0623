"""Saved states of a trainer: one that is refused leaves everything as it was; a trainer can be copied and pickled at any time."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import StateError
from dnifx.runtime.training.trainer import Trainer
from tests.mistakes.nets import Windows
from tests.passes.programs import mlp

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Optional(nn.Module):
    """Trains one more layer where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.more, self.leave = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        h = torch.relu(self.enter(x))
        answer: Tensor = self.leave(torch.relu(self.more(h)) if more else h)
        return answer


def plain(**options: Any) -> Trainer:
    torch.manual_seed(0)
    net = dnifx.decouple(mlp(6, 8, 8, 3), ["1", "3"], args=(X,), loss=F.cross_entropy)
    return net.trainer(torch.optim.Adam, lr_scheduler=lambda each: StepLR(each, 2), **options)


def accumulating() -> Trainer:
    return plain(accumulate=2, clip=0.5)


def windows() -> Trainer:
    torch.manual_seed(0)
    cut = dnifx.Recurrent("h", "1")
    net = dnifx.decouple(Windows(), cut, args=(X, torch.zeros(1, 8, 4)), loss=F.cross_entropy)
    return net.trainer(torch.optim.Adam)


def optional() -> Trainer:
    torch.manual_seed(0)
    net = dnifx.decouple(Optional(), ["enter"], args=(X,), loss=F.cross_entropy)
    return net.trainer(torch.optim.Adam)


def plateau() -> Trainer:
    torch.manual_seed(0)
    net = dnifx.decouple(mlp(6, 8, 3), ["1"], args=(X,), loss=F.cross_entropy)
    return net.trainer(torch.optim.Adam, lr_scheduler=lambda each: ReduceLROnPlateau(each, patience=0))


MADE = {each.__name__: each for each in (plain, accumulating, windows, optional, plateau)}


@cache
def prototype(kind: str) -> Trainer:
    return MADE[kind]()


def fresh(kind: str) -> Trainer:
    """Return a new trainer of a kind."""
    return copy.deepcopy(prototype(kind))


def step(trainer: Trainer) -> Tensor:
    loss = trainer.step(X, target=Y).loss
    assert loss is not None
    return loss


def state_of(trainer: Trainer) -> dict[str, Any]:
    return copy.deepcopy(trainer.state_dict())


def assert_same(one: Any, other: Any) -> None:
    found, expected = pytree.tree_flatten(one), pytree.tree_flatten(other)
    assert found[1] == expected[1]
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def paths(tree: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to everything in a state."""
    if start:
        yield start
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield from paths(item, (*start, key))


def damaged(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return a state with one entry replaced, or taken out."""
    found = copy.deepcopy(state)
    *way, last = path
    holder: Any = found
    for key in way:
        holder = holder[key]
    if value is KeyError:
        del holder[last]
    else:
        holder[last] = value
    return found


DAMAGES: tuple[Any, ...] = (KeyError, None, "text", {}, torch.zeros(2, 7), 10**9)


@settings(max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("kind", MADE)
def test_a_state_that_is_refused_changes_nothing(kind: str, data: st.DataObject) -> None:
    other, trainer = fresh(kind), fresh(kind)
    for _ in range(3):
        step(other)
    step(trainer)
    if kind == "optional":
        other.step(X, True, target=Y)
    saved = state_of(other)
    before = state_of(trainer)
    path = data.draw(st.sampled_from(list(paths(saved))))
    value = data.draw(st.sampled_from(DAMAGES))
    groups = [list(group["params"]) for each in trainer.optimizers.values() for group in each.param_groups]
    try:
        trainer.load_state_dict(damaged(saved, path, value))
    except StateError:
        assert_same(trainer.state_dict(), before)
        after = [list(group["params"]) for each in trainer.optimizers.values() for group in each.param_groups]
        assert [list(map(id, each)) for each in groups] == [list(map(id, each)) for each in after]
        twin = fresh(kind)
        step(twin)
        assert torch.equal(step(trainer), step(twin)), "it goes on as if nothing had been loaded"


def test_a_state_stays_as_it_is_when_a_trainer_goes_on_from_it() -> None:
    first = plain()
    for _ in range(3):
        first.step(X, target=Y)
    state = first.state_dict()
    ends = []
    for _ in range(2):
        other = plain()
        other.load_state_dict(state)
        for _ in range(3):
            other.step(X, target=Y)
        ends.append(tuple(other.net.model_parameters()))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("state", [None, [], 3, {}, {"steps": 1}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(StateError, match=r"saved state"):
        plain().load_state_dict(state)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("copies", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_copy_of_a_trainer_trains_on_as_the_trainer_does(kind: str, copies: Callable[..., Any], steps: int) -> None:
    if kind in ("plateau", "windows") and copies is not copy.deepcopy:
        kind = "plain"  # its scheduler holds a lambda
    trainer = fresh(kind)
    for _ in range(steps):
        step(trainer)
    again = copies(trainer)
    assert again.steps == trainer.steps
    for _ in range(3):
        assert torch.equal(step(again), step(trainer))
    assert_same(again.state_dict(), trainer.state_dict())
    owned = {id(each) for each in again.net.parameters()}
    held = {
        id(each)
        for optimizer in (*again.optimizers.values(), *again.estimator_optimizers.values())
        for group in optimizer.param_groups
        for each in group["params"]
    }
    assert held <= owned
    assert not held & {id(each) for each in trainer.net.parameters()}
