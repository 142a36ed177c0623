"""What the estimators of messages see beside them: the target of the part that sends, in the window in which it sends."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx import schedules
from dnifx.errors import ContextError, LossError
from dnifx.zoo.two_clocks import TwoClocks, count_loss, zero_state
from tests.passes.rates.system_models import SystemCase, message_interfaces, system_cases


class Seen(nn.Module):
    """Answers with zeros, and writes down what it is asked about, and what of it is fitted: as targets arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, Tensor | None]] = []
        self.arrived: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        self.asked.append((values[0], context))
        made = tuple(torch.zeros_like(value) + 0 * self.anchor for value in values)
        made[0].register_hook(lambda _: self.arrived.append((values[0], context)))
        return made

    @property
    def sent(self) -> list[tuple[Tensor, Tensor | None]]:
        fitted = {id(values) for values, _ in self.arrived}
        return [(values, context) for values, context in self.asked if id(values) not in fitted]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def as_it_is(target: Tensor) -> Tensor:
    return target


def told(case: SystemCase, gradient: Any) -> dnifx.DecoupledModule:
    """Decouple with the fast part's own answers as the context."""
    rest = {"*_state": "zero"} if case.states else {}
    inner = dict.fromkeys(case.inner, "zero")
    return case.decouple({"fast": gradient, **inner, **rest}, context=as_it_is, num_classes=2)


@settings(max_examples=8)
@given(system_cases(own_loss=True))
def test_messages_are_seen_with_the_target_of_their_own_window(case: SystemCase) -> None:
    seen = Seen()
    trainer = told(case, lambda spec: seen).trainer(sgd)
    seen.asked, seen.arrived = [], []
    for period in range(2):
        answers = case.period(period)[1]
        for number in range(case.every):
            case.step(trainer, period, number, diagnose=bool(period))
            _, context = seen.sent[-1]
            assert context is not None
            assert torch.equal(context, answers[number])
        values, contexts = seen.arrived[-1]
        assert contexts is not None
        assert torch.equal(contexts, answers.flatten(0, 1))
        assert torch.equal(values, torch.cat([message for message, _ in seen.sent[-case.every :]]))
    assert (len(seen.sent), len(seen.arrived)) == (2 * case.every, 2)


@settings(max_examples=6)
@given(system_cases(own_loss=True), st.integers(1, 4))
def test_a_run_with_a_context_resumes_bit_for_bit(case: SystemCase, stop: int) -> None:
    other = copy.deepcopy(case)
    trainer = told(case, "synthetic").trainer(sgd)
    for window in range(7):
        if window == stop:
            saved = copy.deepcopy(trainer.state_dict())
        case.step(trainer, window // case.every, window % case.every)
    resumed = told(other, "synthetic").trainer(sgd)
    resumed.load_state_dict(saved)
    for window in range(stop, 7):
        other.step(resumed, window // case.every, window % case.every)
    first, second = trainer.net.state_dict(), resumed.net.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=4)
@given(system_cases(own_loss=True))
def test_a_step_that_breaks_off_keeps_no_context(case: SystemCase) -> None:
    seen = Seen()
    trainer = told(case, lambda spec: seen).trainer(sgd)
    last = case.every - 1
    for number in range(last):
        case.step(trainer, 0, number)
    x, answers, _ = case.period(0)
    with pytest.raises(LossError):
        trainer.step(case.window(x, last), target={"fast": answers[last:], "slow": "no tensor"})
    case.step(trainer, 0, last)
    _, contexts = seen.arrived[-1]
    assert contexts is not None
    assert torch.equal(contexts, answers.flatten(0, 1))


class Rung(nn.Module):
    """Answers once, and passes on as many messages as it hears."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lift = nn.Linear(size, 4)

    def forward(self, messages: Tensor) -> tuple[Tensor, Tensor]:
        heard = torch.tanh(self.lift(messages))
        return heard.sum(0), heard


class Ladder(nn.Module):
    """Three networks that each answer, and hear the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.middle, self.slow = Rung(3), Rung(4), Rung(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, messages = self.fast(x)
        second, messages = self.middle(messages)
        return {"fast": first, "middle": second, "slow": self.slow(messages)[0]}


def classes(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target.reshape(-1, len(output))[-1])


def ladder(gradient: Any, losses: Sequence[str] = ("fast", "middle", "slow")) -> dnifx.DecoupledModule:
    torch.manual_seed(0)
    return dnifx.decouple(
        Ladder(),
        ["fast", "middle"],
        every={"middle": 2, "slow": 4},
        args=(torch.randn(1, 5, 3),),
        loss=dict.fromkeys(losses, classes),
        gradient=gradient,
        context="label",
        num_classes=4,
    )


@pytest.mark.parametrize("each", [False, True])
def test_a_label_goes_with_every_message_of_a_firing_or_one_with_each(each: bool) -> None:
    seen = {"fast": Seen(), "middle": Seen()}
    trainer = ladder({name: (lambda spec, one=one: one) for name, one in seen.items()}).trainer(sgd)
    for one in seen.values():
        one.asked, one.arrived = [], []
    labels = torch.arange(4 * 2 * 5).reshape(4, 2, 5) * 7 % 4
    for window in range(4):
        middle = labels[window] if each else labels[window, 0]
        target = {"fast": labels[window, 0], "middle": middle, "slow": torch.zeros(5, dtype=torch.long)}
        trainer.step(torch.randn(1, 5, 3), target=target)
    one_hot = nn.functional.one_hot(labels, 4).float()
    found = [context for _, context in (*seen["fast"].arrived, *seen["middle"].arrived)]
    sent = one_hot[1::2] if each else one_hot[1::2, :1].expand(-1, 2, -1, -1)
    wanted = [one_hot[:2, 0].flatten(0, 1), one_hot[2:, 0].flatten(0, 1), sent.flatten(0, 2)]
    assert [context.shape for context in found if context is not None] == [(10, 4), (10, 4), (20, 4)]
    assert all(
        context is not None and torch.equal(context, right) for context, right in zip(found, wanted, strict=True)
    )


def test_an_estimator_learns_from_the_label_of_each_message() -> None:
    net = ladder(dnifx.estimators.Synthetic(hidden=0))
    assert "label (4 classes) of the part that sends" in str(net)
    weights = [next(each.estimator.parameters()) for each in message_interfaces(net)]
    assert [tuple(weight.shape) for weight in weights] == [(4, 4 + 4)] * 2
    trainer = net.trainer(sgd)
    for _ in range(4):
        label = torch.randint(4, (5,))
        trainer.step(torch.randn(1, 5, 3), target=dict.fromkeys(("fast", "middle", "slow"), label))
    assert all(bool(weight[:, 4:].any()) for weight in weights)


def test_local_losses_stand_on_messages_where_labels_are_told() -> None:
    ticks, batch = 2, 3
    net = dnifx.decouple(
        TwoClocks(16, width=8, ticks=ticks),
        ["fast", dnifx.Recurrent("fast_state", "2"), dnifx.Recurrent("slow_state", "3")],
        every={"slow": ticks},
        args=(torch.rand(ticks, batch, 16), zero_state(batch, 8), zero_state(batch, 8)),
        loss={"fast": count_loss, "slow": count_loss},
        gradient={"fast": "local_loss", "*_state": "zero"},
        context="label",
        num_classes=ticks + 1,
    )
    trainer = net.trainer(sgd)
    assert str(schedules.sequential_period(net.program)) == "F0 S0 M0 B0 U0 | F0 S0 M0 B0 U0 F1 B1 U1"
    estimator = message_interfaces(net)[0].estimator
    for window in range(ticks):
        before = copy.deepcopy(estimator.state_dict())
        target = {"fast": torch.ones(1, batch, dtype=torch.long), "slow": torch.ones(batch, dtype=torch.long)}
        result = trainer.step(torch.rand(ticks, batch, 16), target=target, diagnose=True)
        assert any(not torch.equal(before[name], each) for name, each in estimator.state_dict().items())
        assert ("fast" in result.diagnostics) == (window == ticks - 1)


def test_a_context_that_cannot_be_says_why() -> None:
    with pytest.raises(ContextError, match=r"no part of every=\{'slow': 1\} fires less often than another"):
        dnifx.decouple(
            Ladder(), ["fast"], every={"slow": 1}, args=(torch.randn(1, 5, 3),), context="label", num_classes=4
        )
    with pytest.raises(ContextError, match=r"submod_0, which sends 'fast', has no loss, and so no target"):
        ladder("zero", ("middle", "slow")).trainer(sgd)
    trainer = ladder("zero").trainer(sgd)
    wrong = {"fast": torch.zeros(3, 5, dtype=torch.long)}
    with pytest.raises(
        ContextError, match=r"features are \[3, 5, 4\] for messages of \[1, 5, 4\]; expected \[5, width\]"
    ):
        trainer.step(torch.randn(1, 5, 3), target=wrong)
