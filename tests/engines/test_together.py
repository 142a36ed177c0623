"""Estimators that are alike are asked in one call where steps are CUDA graphs: the numbers of separate calls, to rounding."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD

import dnifx
from dnifx import schedules
from dnifx.engines.cuda_graph import CudaGraph
from dnifx.ir import Kind
from dnifx.passes.emit.alike import are_same, groups
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.passes.programs import mlp

WIDTH, X = 8, torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(6) % 3
momentum = partial(SGD, lr=0.05, momentum=0.9)


class Image(nn.Module):
    """Convolutions of equal size, and one that is smaller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.view(6, 1, 2, 4)))
        hidden = torch.relu(self.third(torch.relu(self.second(hidden))))
        output: Tensor = self.last(hidden).mean((2, 3))
        return output


class Asks(nn.Module):
    """An estimator of a user."""

    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        self.scale, self.map = scale, nn.Linear(features, features)

    def forward(self, values: tuple[Tensor, ...], context: Any) -> tuple[Tensor, ...]:
        return tuple(self.scale * self.map(value) for value in values)


def own(spec: Any, scales: Any = None) -> nn.Module:
    return Asks(spec.values[0].shape[-1], 1.0 if scales is None else next(scales))


def net(gradient: Any, model: Callable[[], nn.Module], cuts: Any, **options: Any) -> DecoupledModule:
    torch.manual_seed(0)
    made = dnifx.decouple(model().double(), cuts, args=(X,), gradient=gradient, **options).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for each in made.interfaces.parameters():
            each.normal_(std=0.1)
    return made


def chain() -> nn.Module:
    return mlp(WIDTH, WIDTH, WIDTH, WIDTH, 3)


def wedge() -> nn.Module:
    return mlp(WIDTH, WIDTH, 4, WIDTH, 3)


LABEL: dict[str, Any] = {"context": "label", "num_classes": 3}
PLAIN: dict[str, Any] = {"loss": cross_entropy}
CASES: dict[str, tuple[Any, Callable[[], nn.Module], Any, dict[str, Any], list[tuple[int, ...]]]] = {
    "linear": (dnifx.estimators.Synthetic(hidden=0), chain, ["1", "3", "5"], PLAIN, [(0, 1, 2)]),
    "default": ("synthetic", chain, ["1", "3", "5"], PLAIN, [(0, 1, 2)]),
    "label": ("synthetic", chain, ["1", "3", "5"], PLAIN | LABEL, [(0, 1, 2)]),
    "own": (own, chain, ["1", "3", "5"], PLAIN, [(0, 1, 2)]),
    "widths": (dnifx.estimators.Synthetic(hidden=0), wedge, ["1", "3", "5"], PLAIN, [(0, 2)]),
    "images": ("synthetic", Image, ["first", "second", "third"], PLAIN, [(1, 2)]),
    "batch norm": ("paper", chain, ["1", "3"], PLAIN, []),
    "suffix": ("suffix", chain, ["1", "3"], PLAIN, []),
    "one": ("synthetic", chain, ["3"], PLAIN, []),
    "fixed": ("zero", chain, ["1", "3"], PLAIN, []),
}


def batched(made: DecoupledModule, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Trainer, list[str]]:
    """Return a trainer whose steps are written as those of a CUDA graph, and run as they come; and their sources."""
    engine, sources = CudaGraph(torch.device("cpu")), list[str]()
    monkeypatch.setattr(engine, "made", lambda run, batch, reads: run(batch))
    write = made.emitters.step

    def noted(*given: Any) -> str:
        sources.append(write(*given))
        return sources[-1]

    made.__dict__["emitters"] = replace(made.emitters, engine=lambda *_: engine, step=noted)
    return made.trainer(momentum, **options), sources


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"schedule": ""}], ids=["", "clip", "unfitted"])
def test_estimators_that_are_asked_together_have_the_numbers_of_others(
    case: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient, model, cuts, given, found = CASES[case]
    one, other = (net(gradient, model, cuts, **given) for _ in range(2))
    in_phases = schedules.phases(one.program)
    assert list(groups(in_phases.actions, one.program)) == found
    chosen = {"schedule": "phases", **options}
    if "schedule" in options:
        chosen["schedule"] = schedules.fixed(schedules.without_fits(in_phases, one.program), partial=True)
    trainer, sources = batched(one, monkeypatch, **chosen)
    plain = other.trainer(momentum, **chosen)
    for step in range(5):
        diagnose = step == 3
        made, wanted = (each.step(X.roll(step, 0), target=Y.roll(step), diagnose=diagnose) for each in (trainer, plain))
        torch.testing.assert_close(made.output, wanted.output)
        torch.testing.assert_close(dict(made.diagnostics), dict(wanted.diagnostics), equal_nan=True)
    assert all(("self.together(" in each) == bool(found) for each in sources)
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def test_only_what_stands_together_is_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made = net("synthetic", chain, ["1", "3", "5"], **PLAIN)
    assert groups(schedules.sequential(made.program).actions, made.program) == ()
    apart = schedules.parse("F0 F1 F2 F3 S0 S1 B3 S2 B2 B1 B0 U0 U1 U2 U3 T0 T1 T2 M0 M1 M2")
    assert groups(apart.actions, made.program) == ((0, 1),)
    fits = schedules.parse("F0 F1 F2 F3 S0 S1 S2 B3 B2 B1 B0 U0 U1 U2 U3 T0 T1 M0 T2 M1 M2")
    assert groups(fits.actions, made.program) == ()
    trainer, sources = batched(made, monkeypatch, schedule=str(apart))
    trainer.step(X, target=Y)
    assert "estimate_cut_1, estimate_cut_3, = self.together(" in sources[0]


def test_estimators_that_differ_in_more_than_values_are_asked_apart() -> None:
    scales = iter([1.0, 2.0, 1.0])
    made = net(partial(own, scales=scales), chain, ["1", "3", "5"], **PLAIN)
    actions = schedules.phases(made.program).actions
    assert groups(actions, made.program) == ((0, 2),)
    made.program.interfaces[2].estimator.map.bias.requires_grad_(False)  # type: ignore[union-attr]
    assert groups(actions, made.program) == ()
    assert not are_same(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    assert not are_same(nn.LeakyReLU(0.1), nn.LeakyReLU(0.2))
    assert are_same(nn.LeakyReLU(0.1), nn.LeakyReLU(0.1))


def test_phases_have_the_numbers_of_the_sequential_schedule() -> None:
    one, other = (net("paper", chain, ["1", "3", "5"], **PLAIN | LABEL) for _ in range(2))
    first, second = one.trainer(momentum, schedule="phases"), other.trainer(momentum)
    kinds = [action.kind for action in schedules.phases(one.program).actions]
    assert kinds == sorted(kinds, key=list(dict.fromkeys(kinds)).index)
    assert kinds[0] is Kind.FORWARD
    for step in range(4):
        for each in (first, second):
            each.step(X.roll(step, 0), target=Y.roll(step))
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_several_values_on_a_boundary_are_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            one, two = x, x
            for number in range(3):
                one, two = torch.tanh(self.maps[2 * number](one + two)), torch.tanh(self.maps[2 * number + 1](two))
            return one * two

    def made() -> DecoupledModule:
        return net("synthetic", Pairs, 3, loss=mse_loss)

    one, other = made(), made()
    assert [len(each.values) for each in one.boundaries] == [2, 2]
    trainer, sources = batched(one, monkeypatch, schedule="phases")
    plain = other.trainer(momentum, schedule="phases")
    for each in (trainer, plain):
        each.step(X, target=X)
    assert "self.together(" in sources[0]
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
