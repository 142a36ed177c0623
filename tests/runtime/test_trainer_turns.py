"""One step at a time; a step that breaks off says what it had updated, and the next one goes on."""

import copy
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dnifx
from dnifx.errors import LossError, StateError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.turns import Turn
from tests.passes.programs import mlp

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
FITS = {"cut_1": "the estimator of '1'", "cut_3": "the estimator of '3'"}


class Loss:
    """A cross entropy that first calls a function, if one was set."""

    reduction = "mean"

    def __init__(self) -> None:
        self.before: Callable[[], object] | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if self.before is not None:
            self.before()
        return F.cross_entropy(output, target)


@cache
def prototype() -> DecoupledModule:
    """Return a net whose estimators have begun to learn."""
    torch.manual_seed(0)
    net = dnifx.decouple(mlp(6, 8, 8, 3), ["1", "3"], args=(X,), loss=Loss())
    trainer = net.trainer(lambda p: torch.optim.SGD(p, lr=0.01))
    for _ in range(3):
        trainer.step(X, target=Y)
    return net


def made() -> tuple[dnifx.Trainer, Loss]:
    net = copy.deepcopy(prototype())
    loss: Any = net.loss
    return net.trainer(lambda p: torch.optim.SGD(p, lr=0.1)), loss


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["submod_0", "submod_1", "submod_2", *FITS])
@pytest.mark.parametrize("schedule", ["sequential", "backprop"])
def test_an_interrupted_step_says_what_was_updated_and_the_next_goes_on(name: str, schedule: str) -> None:
    net = copy.deepcopy(prototype())
    trainer = net.trainer(lambda p: torch.optim.SGD(p, lr=0.1), schedule)
    trainer.step(X, target=Y)
    groups = trainer.optimizers if name in trainer.optimizers else trainer.estimator_optimizers
    hook = groups[name].register_step_pre_hook(interrupt)
    before = {each: value.detach().clone() for each, value in net.named_parameters()}
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.step(X, target=Y)
    (note,) = caught.value.__notes__
    moved = {each for each, value in net.named_parameters() if not torch.equal(value, before[each])}
    updated, rest = note.split("Updated: ")[1].split(". ", 1)
    assert note.startswith("step 1 broke off. ")
    assert f"In the middle of its update: {FITS.get(name, name)}." in rest
    for partition in net.partitions:
        assert (partition.name in updated) == bool(moved & set(partition.parameters))
        assert (partition.name in updated) + (partition.name in rest) == 1
    for key, text in FITS.items():
        assert (text in updated) == any(key in each for each in moved)
    hook.remove()
    assert trainer.steps == 1
    expected = copy.deepcopy(trainer)
    for each in expected.net.parameters():
        each.grad = None
    trainer.step(X, target=Y)
    expected.step(X, target=Y)
    assert all(map(torch.equal, trainer.net.parameters(), expected.net.parameters())), "no gradient was left behind"
    assert trainer.steps == 2


def test_an_error_before_any_update_says_that_nothing_was_updated() -> None:
    trainer, _ = made()
    with pytest.raises(dnifx.DnifxError) as caught:
        trainer.step(X, target=Y, context=Y)
    assert caught.value.__notes__ == ["step 0 broke off before it had updated anything; the next step goes on"]
    trainer.step(X, target=Y)


def test_a_loss_that_is_not_finite_says_what_was_updated() -> None:
    trainer, loss = made()
    trainer.step(X, target=Y)
    loss.before = None
    with pytest.raises(LossError) as caught:
        trainer.step(X, target=torch.full((8, 3), torch.nan))
    assert "Updated: submod_0, the estimator of '1', submod_1. Not updated: the estimator of '3', submod_2" in "".join(
        caught.value.__notes__
    ).replace("Not updated: submod_2, the estimator of '3'", "Not updated: the estimator of '3', submod_2")


def test_a_step_inside_a_step_is_refused() -> None:
    trainer, loss = made()
    loss.before = lambda: trainer.step(X, target=Y)
    with pytest.raises(StateError, match=r"in the middle of a step, in another thread or in a function"):
        trainer.step(X, target=Y)
    loss.before = None
    trainer.step(X, target=Y)


@pytest.mark.parametrize(
    "other",
    [
        lambda trainer: trainer.step(X, target=Y),
        lambda trainer: trainer.compute(X, target=Y),
        lambda trainer: trainer.probe(X, target=Y),
        lambda trainer: trainer.state_dict(),
        lambda trainer: trainer.load_state_dict({}),
    ],
)
def test_another_thread_is_refused_while_a_step_runs(other: Callable[[Any], object]) -> None:
    trainer, loss = made()
    inside, done = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert done.wait(60)

    loss.before = wait
    worker = threading.Thread(target=lambda: trainer.step(X, target=Y))
    worker.start()
    assert inside.wait(60)
    try:
        with pytest.raises(StateError, match="in the middle of a step"):
            other(trainer)
    finally:
        done.set()
        worker.join()
    loss.before = None
    assert trainer.steps == 1
    trainer.step(X, target=Y)


def test_a_step_in_another_thread_is_fine_once_the_first_is_over() -> None:
    trainer, _ = made()
    worker = threading.Thread(target=lambda: trainer.step(X, target=Y))
    worker.start()
    worker.join()
    trainer.step(X, target=Y)
    assert trainer.steps == 2


def test_many_names_are_cut_short() -> None:
    turn = Turn()
    turn.updated = [f"submod_{number}" for number in range(500)]
    note = turn.note(3, [f"submod_{number}" for number in range(1000)])
    assert "submod_5 and 494 more" in note
    assert len(note) < 600
