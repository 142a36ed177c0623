"""Probes of systems: every estimate beside the gradient of joint backpropagation, and nothing changed by looking."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import HarmWarning, InputError, LossError
from dnifx.zoo.two_clocks import TwoClocks, count_loss, zero_state
from tests.passes.rates.system_models import SystemCase, joint, system_cases


class Told(nn.Module):
    """Answers with what a table says of the values it is asked about, times a factor; zero for any other."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.factor = factor
        self.table: list[tuple[Tensor, Sequence[Tensor]]] = []

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        found = next((said for first, said in self.table if torch.equal(first, values[0])), None)
        return tuple(
            self.factor * (torch.zeros_like(value) if found is None else found[place]) + 0 * self.anchor
            for place, value in enumerate(values)
        )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def period_of(case: SystemCase, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    x, answers, verdict = case.period(seed)
    return [
        (case.window(x, number), {"fast": answers[number : number + 1], "slow": verdict})
        for number in range(case.every)
    ]


def per_example(gradient: Tensor, case: SystemCase) -> Tensor:
    return gradient * (case.batch if case.mean else 1)


def listen(value: Tensor, heard: list[Tensor]) -> None:
    """Write down the gradient that a value will receive."""
    value.register_hook(heard.append)


def norm(gradients: Sequence[Tensor]) -> float:
    """Return the root mean square over the first dimension of the norm, as diagnostics do."""
    return float(torch.cat([each.flatten(1) for each in gradients]).norm(dim=1).square().mean().sqrt())


@settings(max_examples=10)
@given(system_cases(), st.sampled_from([1.0, 2.0, -1.0]))
def test_estimates_are_compared_with_joint_backpropagation_through_the_period(case: SystemCase, factor: float) -> None:
    """Told the true gradients times a factor, estimators of messages and states are found right but for that factor."""
    told = {name: Told(factor) for name in ("fast", "fast_state", "slow_state")}
    choices: dict[str, Any] = {name: (lambda spec, each=each: each) for name, each in told.items()}
    names = {"fast", *case.states}
    trainer = case.decouple({**{name: choices[name] for name in names}, **dict.fromkeys(case.inner, "zero")}).trainer(
        sgd
    )
    lifted: list[Tensor] = []
    hooks = [
        case.model.get_submodule(name).register_forward_hook(lambda _, __, out: listen(out, lifted))
        for name in case.inner
    ]
    true = joint(case, 0, case.states, cut_messages=False, cut_time=False)
    for hook in hooks:
        hook.remove()
    told["fast"].table = [
        (said[0].flatten(0, 1), [per_example(each.flatten(0, 1), case) for each in arrived])
        for said, arrived in zip(true.messages, true.arrived, strict=True)
    ]
    if "fast_state" in names:
        told["fast_state"].table = [
            (ended[0], [per_example(each, case) for each in later])
            for ended, later in zip(true.ended[:-1], true.later[:-1], strict=True)
        ]
    found = trainer.probe_period(period_of(case, 0))
    assert set(found.true) == {"fast", *case.inner, *(["fast_state"] if "fast_state" in names else [])}
    for name in set(found.true) - set(case.inner):
        assert float(found.true[name]["relative_error"]) == pytest.approx(abs(factor - 1), abs=1e-9)
        assert float(found.true[name]["estimate_norm"]) > 0
    for name in case.inner:
        wanted = norm([per_example(each, case) for each in lifted])
        assert float(found.true[name]["target_norm"]) == pytest.approx(wanted, rel=1e-9)
    assert {name: len(each) for name, each in found.losses.items()} == {
        "slow": 1,
        **({"fast": case.every} if case.own_loss else {}),
    }


@settings(max_examples=6)
@given(system_cases(), st.integers(0, 3))
def test_nothing_is_changed_by_looking(case: SystemCase, before: int) -> None:
    other = copy.deepcopy(case)
    torch.manual_seed(0)
    looking = case.decouple().trainer(sgd)
    torch.manual_seed(0)
    trainer = other.decouple().trainer(sgd)
    for window in range(7):
        if window == before:
            looking.reset(torch.arange(case.batch) == 0)
            trainer.reset(torch.arange(case.batch) == 0)
            gradients = [parameter.grad for parameter in looking.net.parameters()]
            kept, random = copy.deepcopy(looking.state_dict()), torch.get_rng_state()
            looking.probe_period(period_of(case, 3))
            assert torch.equal(random, torch.get_rng_state())
            assert all(one is two.grad for one, two in zip(gradients, looking.net.parameters(), strict=True))
            assert same(kept, looking.state_dict())
        case.step(looking, window // case.every, window % case.every)
        other.step(trainer, window // case.every, window % case.every)
    assert same(looking.state_dict(), trainer.state_dict())


def same(one: Any, other: Any) -> bool:
    first, second = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


@settings(max_examples=4)
@given(system_cases(own_loss=True))
def test_a_probe_begins_with_the_states_that_are_carried(case: SystemCase) -> None:
    trainer = case.decouple().trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    for number in range(case.every):
        case.step(trainer, 0, number)
    found = trainer.probe_period(period_of(case, 1))
    stepped: dict[str, list[Tensor]] = {"fast": [], "slow": []}
    for number in range(case.every):
        for name, loss in case.step(trainer, 1, number).losses.items():
            stepped[name].append(loss)
    assert all(torch.equal(found.losses[name], torch.stack(each)) for name, each in stepped.items())


def clocks(gradient: Any, **options: Any) -> dnifx.DecoupledModule:
    torch.manual_seed(0)
    return dnifx.decouple(
        TwoClocks(16, width=8, ticks=2),
        ["fast", dnifx.Recurrent("fast_state", "2"), dnifx.Recurrent("slow_state", "3")],
        every={"slow": 2},
        args=(torch.rand(2, 6, 16), zero_state(6, 8), zero_state(6, 8)),
        loss={"fast": count_loss, "slow": count_loss},
        gradient={"fast": gradient, "*_state": "zero"},
        **options,
    )


def digits(seed: int) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    draws = torch.Generator().manual_seed(seed)
    target = {"fast": torch.ones(1, 6, dtype=torch.long), "slow": torch.ones(6, dtype=torch.long)}
    return [(torch.rand(2, 6, 16, generator=draws), target) for _ in range(2)]


def test_running_statistics_stay_and_inputs_are_given_as_to_a_step() -> None:
    net = clocks("synthetic", context="label", num_classes=3)
    trainer = net.trainer(sgd)
    before = copy.deepcopy(net.state_dict())
    found = trainer.probe_period(digits(0))
    assert same(before, net.state_dict())
    assert set(found.true) == {"fast", "fast_state"}
    assert len(trainer.probe_period(digits(0) * 2).losses["slow"]) == 2
    for inputs in (lambda x: (x,), lambda x: {"digits": x}):
        again = trainer.probe_period([(inputs(x), target) for x, target in digits(0)])
        assert same(again.true, found.true)
    given = [((x, (torch.ones(6, 8), torch.ones(6, 8))), target) for x, target in digits(0)]
    assert not torch.equal(trainer.probe_period(given[:1] + digits(0)[1:]).losses["fast"], found.losses["fast"])


def test_a_probe_that_cannot_be_says_why() -> None:
    trainer = clocks("synthetic").trainer(sgd)
    for windows in ([], digits(0)[:1], digits(0) + digits(0)[:1]):
        with pytest.raises(InputError, match=r"a probe looks at a whole period: got .* expected 2"):
            trainer.probe_period(windows)
    with pytest.raises(LossError, match="the part of 'slow' fires in this window, and its target is missing"):
        trainer.probe_period([(x, {"fast": target["fast"]}) for x, target in digits(0)])


def test_a_watch_follows_steps_and_probes_of_a_system() -> None:
    """One whose estimates have run away is warned of."""
    trainer = clocks("synthetic").trainer(sgd)
    watch = dnifx.Watch(patience=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            for x, target in digits(step):
                result = trainer.step(x, target=target, diagnose=True)
                watch.see(result.diagnostics)
    assert "fast: cosine" in str(watch)

    class Loud(nn.Module):
        def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
            return tuple(torch.full_like(value, 1e6) for value in values)

    found = clocks(lambda spec: Loud()).trainer(sgd).probe_period(digits(0)).true["fast"]
    with pytest.warns(HarmWarning, match="'fast'"):
        dnifx.Watch(patience=1).see({"fast": found})
