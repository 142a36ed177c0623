"""The fused form of models with several rates: one call of any number of windows, against plain autograd."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import ContextError, CutError, LossError
from tests.passes.rates.system_models import SystemCase, detached, largest, message_interfaces, system_cases
from tests.passes.rates.test_systems import Chain, chain, mean_square, plain_case


class Third(nn.Module):
    """Answers with a third of the values, and writes down the targets that it is fitted to."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.targets: dict[int, Tensor] = {}

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        made = tuple(value / 3 + 0 * self.anchor for value in values)
        for place, each in enumerate(made if torch.is_grad_enabled() else ()):
            said = each.detach()
            each.register_hook(lambda fit, place=place, said=said: self.note(place, said - fit * len(said) / 2))
        return made

    def note(self, place: int, target: Tensor) -> None:
        self.targets[place] = target.detach()


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def loss_of(case: SystemCase, output: dict[str, Any], seed: int) -> Tensor:
    _, answers, verdict = case.period(seed)
    slow = case.loss(output["verdict"], verdict)
    return slow + case.loss(output["answers"], answers) if case.own_loss else slow


def by_hand(case: SystemCase, scale: float, seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the gradients of a period under estimates of a third of each message, and the gradient at each message."""
    states = case.states
    answers, messages, _ = case.model.fast(case.period(seed)[0], detached(states.get("fast_state")))
    heard = tuple(message.detach().requires_grad_() for message in messages)
    verdict, _ = case.model.slow(heard, detached(states.get("slow_state")))
    weight = scale / case.batch if case.mean else scale
    total = loss_of(case, {"answers": answers, "verdict": verdict}, seed)
    total = total + sum((message * (message.detach() / 3) * weight).sum() for message in messages)
    names = dict(case.model.named_parameters())
    found = torch.autograd.grad(total, [*names.values(), *heard], allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=False)), list(found[len(names) :])


@settings(max_examples=10)
@given(system_cases(), st.sampled_from([1.0, 10.0]))
def test_a_period_in_one_call_learns_from_the_estimates_of_its_messages(case: SystemCase, scale: float) -> None:
    third = Third()
    chosen = {"fast": lambda spec: third, **dict.fromkeys(case.inner, "oracle")}
    net = case.decouple({**chosen, **({"*_state": "zero"} if case.states else {})}, scale)
    x, _, _ = case.period(0)
    output = net(x, **case.states)
    expected = case.model(x, **case.states)
    leaves = zip(tensors(output), tensors(expected), strict=True)
    assert all(torch.equal(one, other) for one, other in leaves)
    gradients, arrived = by_hand(case, scale, 0)
    loss_of(case, output, 0).backward()
    own = dict(case.model.named_parameters())
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in own.values()]
    assert largest(found, [gradients[name] for name in own]) < 1e-10
    factor = case.batch if case.mean else 1
    for place, each in enumerate(arrived):
        assert largest([third.targets[place]], [factor * each.flatten(0, 1)]) < 1e-10


@settings(max_examples=6)
@given(system_cases(inner=False), st.integers(1, 4))
def test_any_number_of_windows_is_one_call(case: SystemCase, windows: int) -> None:
    net = case.decouple()
    x = torch.randn(windows * case.ticks, case.batch, 3, dtype=torch.double)
    expected = case.model(x, **case.states)
    leaves = zip(tensors(net(x, **case.states)), tensors(expected), strict=True)
    assert all(torch.equal(one, other) for one, other in leaves)


def test_the_fused_form_trains_the_estimators_that_the_trainer_uses() -> None:
    case = plain_case()
    net = case.decouple()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = {name: each.clone() for name, each in net.named_parameters() if name.startswith("interfaces.fast.")}
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(case, net(case.period(seed)[0], **case.states), seed).backward()
        optimizer.step()
    assert any(not torch.equal(before[name], each) for name, each in net.named_parameters() if name in before)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    assert message_interfaces(trainer.net)[0].estimator is net.get_submodule("interfaces.fast")
    assert len(net.input_kinds) == 1


def test_what_has_no_fused_form_says_why() -> None:
    case = plain_case()
    told = case.decouple({"fast": "synthetic", "*_state": "zero"}, context=lambda target: target, num_classes=2)
    x = case.period(0)[0]
    with pytest.raises(ContextError, match="made of the targets of single windows"):
        told(x, **case.states, context=torch.zeros(3, 2))
    mixed = {"middle": lambda output, target: output.sum(), "slow": mean_square}
    mixed["middle"].reduction = "sum"  # type: ignore[attr-defined]

    class Heard(Chain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            heard = self.middle(self.fast(x))
            return self.slow(heard).sum(0), heard

    given: dict[str, Any] = {"args": (torch.randn(1, 2, 3),), "loss": mixed}
    net = dnifx.decouple(Heard(), ["fast", "middle"], every={"middle": 2, "slow": 4}, **given)
    with pytest.raises(LossError, match="some losses average over examples and others sum"):
        net(torch.randn(4, 2, 3))

    class Overheard(Chain):
        def forward(self, x: Tensor) -> Tensor:
            message = self.fast(x)
            told: Tensor = self.slow(self.middle(message) + message.mean(0)).sum(0)
            return told

    options: dict[str, Any] = {"args": (torch.randn(1, 2, 3),), "loss": mean_square}
    net = dnifx.decouple(Overheard(), ["fast", "middle"], every={"middle": 2, "slow": 4}, **options)
    with pytest.raises(CutError, match="goes to partitions that fire at different rates"):
        net(torch.randn(4, 2, 3))


def test_a_chain_of_rates_has_a_fused_form() -> None:
    net = chain({"middle": 2, "slow": 4})
    x = torch.randn(4, 2, 3, dtype=torch.double)
    assert torch.equal(net(x), net.original(x))
    mean_square(net(x), torch.zeros(2, 2, dtype=torch.double)).backward()
    assert all(each.grad is not None for each in net.original.slow.parameters())  # type: ignore[union-attr]
