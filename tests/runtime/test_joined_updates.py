"""Updates that are made together: the numbers of separate calls, and what is never joined."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import StepLR

import dnifx
from dnifx.errors import LossError
from dnifx.runtime.training import joined
from dnifx.runtime.training.trainer import Trainer
from dnifx.runtime.training.updates import Update
from tests.contracts.cases import Case, cases, decoupled
from tests.contracts.test_contracts_places import SCHEDULES
from tests.engines.jobs import GRADIENTS, changing
from tests.passes.programs import mlp


def hooked(parameters: Any) -> Optimizer:
    made = Adam(parameters, lr=0.1)
    made.register_step_post_hook(lambda *_: None)
    return made


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adam": partial(Adam, lr=0.05, amsgrad=True),
    "adam, foreach": partial(Adam, lr=0.05, foreach=True),
    "adam, fused": partial(Adam, lr=0.05, fused=True),
    "adamw": partial(AdamW, lr=0.05, weight_decay=0.1),
    "sgd": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rates of their own": lambda p: SGD([{"params": [each], "lr": 0.01 * (1 + each.dim())} for each in p], lr=0.1),
    "some watched": lambda p: hooked(p) if len(p) > 2 else Adam(p, lr=0.05),
    "unlike kinds": lambda p: Adam(p, lr=0.05) if len(p) % 2 else SGD(p, lr=0.05),
    "several": lambda p: [Adam(p[:1], lr=0.05), SGD(p[1:], lr=0.1)] if len(p) > 1 else Adam(p, lr=0.05),
}
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def alike(one: Any, other: Any) -> bool:
    """Whether two saved states are the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) or bool((one != one).all() and (other != other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def apart(trainer: Trainer) -> Trainer:
    """Let a trainer call every optimizer by itself."""
    for part in trainer.parts:
        part.functions.joined = False
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=4)
@given(
    cases(training=True),
    st.sampled_from(sorted(GRADIENTS)),
    st.sampled_from(SCHEDULES),
    st.sampled_from([0, 0, 2]),
    st.sampled_from([{}, {"clip": 0.1}, {"accumulate": 2}, {"lr_scheduler": partial(StepLR, step_size=2)}]),
)
def test_joined_updates_give_the_numbers_of_separate_ones(
    optimizer: str, case: Case, gradient: str, schedule: str, lag: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    try:
        net = decoupled(case, GRADIENTS[gradient])
        one, other = net, copy.deepcopy(net)
        together = one.trainer(OPTIMIZERS[optimizer], schedule, lag=lag, **options)
        separate = apart(other.trainer(OPTIMIZERS[optimizer], schedule, lag=lag, **options))
    except dnifx.DnifxError:
        reject()  # a cut, a lag or an estimator that does not go with this model
    for step in range(5):
        inputs, target = changing(case, step)
        made = []
        for trainer in (together, separate):
            torch.manual_seed(step)
            made.append(trainer.step(*inputs, target=target).loss)
        assert alike(*made)
    assert alike(together.state_dict(), separate.state_dict())


def trainer_of(optimizer: Callable[[Any], Any], schedule: str = "sequential", **options: Any) -> Trainer:
    torch.manual_seed(0)
    gradient = dnifx.estimators.Synthetic(hidden=0)
    net = dnifx.decouple(mlp(6, 8, 8, 8, 3), ["1", "3", "5"], args=(X,), gradient=gradient, loss=cross_entropy)
    return net.trainer(optimizer, schedule, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of what each call updates."""
    found: list[list[str]] = []
    together, alone = joined.make_together, Update.make

    def several(updates: Sequence[Update]) -> None:
        found.append([each.name for each in updates])
        together(updates)

    def one(self: Update) -> None:
        found.append([self.name])
        alone(self)

    monkeypatch.setattr(joined, "make_together", several)
    monkeypatch.setattr(Update, "make", one)
    return found


def test_a_step_of_seven_optimizers_makes_two_calls(calls: list[list[str]]) -> None:
    """The loss may look at any weight, so what was due before it is made before it."""
    trainer = trainer_of(partial(Adam, lr=0.1))
    trainer.step(X, target=Y)
    assert [len(each) for each in calls] == [5, 2]
    assert calls[0] == ["submod_0", "the estimator of '1'", "submod_1", "the estimator of '3'", "submod_2"]
    state = trainer.optimizers["submod_1"].state_dict()
    assert [each["step"].item() for each in state["state"].values()] == [1, 1]


def test_gradients_wait_up_to_a_size(calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "BUCKET", 400)  # of a partition of 72 numbers, 288 bytes
    trainer_of(partial(Adam, lr=0.1)).step(X, target=Y)
    assert [len(each) for each in calls] == [2, 2, 1, 2]


class OwnAdam(Adam):
    """An optimizer of a user's own."""


def replaced(parameters: Any) -> Optimizer:
    made = Adam(parameters, lr=0.1)
    made.step = partial(Adam.step, made)  # type: ignore[method-assign]
    return made


NEVER: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "a class of a user's own": (partial(OwnAdam, lr=0.1), {}),
    "a kind whose step is not known": (partial(NAdam, lr=0.1), {}),
    "hooks": (hooked, {}),
    "a step of a user's own": (replaced, {}),
    "a penalty": (partial(SGD, lr=0.1), {"penalty": lambda p: sum(each.square().sum() for each in p.values())}),
    "a clip of a user's own": (partial(SGD, lr=0.1), {"clip": lambda p: None}),
}


@pytest.mark.parametrize("case", NEVER)
def test_what_somebody_watches_is_called_by_itself(case: str, calls: list[list[str]]) -> None:
    optimizer, options = NEVER[case]
    trainer_of(optimizer, **options).step(X, target=Y)
    assert [len(each) for each in calls] == [1] * 7


def test_the_loss_sees_what_was_updated_before_it() -> None:
    """A loss may look at weights of partitions before it, as long as it carries no gradient to them."""
    torch.manual_seed(0)
    model: Any = mlp(6, 8, 8, 3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) + model[0].weight.detach().square().sum()

    net = dnifx.decouple(model, ["1", "3"], args=(X,), loss=loss)
    trainer = net.trainer(partial(Adam, lr=0.1), "F0 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2")
    for _ in range(2):  # estimators begin at zero, the last one first
        trainer.step(X, target=Y)
    before = model[0].weight.detach().square().sum()
    result = trainer.step(X, target=Y)
    after = model[0].weight.detach().square().sum()
    assert result.loss is not None
    assert before != after
    assert torch.equal(result.loss, cross_entropy(result.output, Y) + after)


def test_a_suffix_copies_weights_that_are_updated() -> None:
    """Its estimate comes after an update of what it copies, where a schedule says so."""
    order = "F0 F1 B1 T0 U1 S0 B0 M0 U0"
    made = []
    for separately in (False, True):
        torch.manual_seed(0)
        gradient = dnifx.estimators.Suffix(readout="shared", refresh=1)
        net = dnifx.decouple(mlp(6, 8, 8, 3), ["1"], args=(X,), gradient=gradient, loss=cross_entropy)
        trainer = net.trainer(partial(Adam, lr=0.1), order)
        if separately:
            apart(trainer)
        for _ in range(3):
            trainer.step(X, target=Y)
        made.append(trainer.state_dict())
    assert alike(*made)


@pytest.mark.parametrize("bad", range(4))
def test_a_step_that_breaks_off_has_updated_what_was_due(bad: int) -> None:
    """The gradient of one partition is not finite: what the schedule has before it is updated, and nothing else."""
    states = []
    for separately in (False, True):
        trainer = trainer_of(partial(Adam, lr=0.1))
        if separately:
            apart(trainer)
        trainer.step(X, target=Y)
        parameter = trainer.updates[f"submod_{bad}"].parameters[0]
        handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(LossError) as error:
            trainer.step(X, target=Y)
        handle.remove()
        trainer.step(X, target=Y)
        states.append((trainer.state_dict(), error.value.__notes__))
    assert alike(*states)
