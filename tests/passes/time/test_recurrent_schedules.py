"""Schedules of recurrent models: the boundary in time has its own actions, printed, parsed, checked and run."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import dnifx
from dnifx import schedules
from dnifx.errors import ScheduleError
from dnifx.estimators import SyntheticState
from tests.passes.time.recurrent_models import Case, Stacked, recurrent_cases

LINEAR = SyntheticState(hidden=0)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def decoupled(*cuts: str, gradient: Any = "synthetic", **options: Any) -> dnifx.DecoupledModule:
    """Return an LSTM with a readout, cut in time and at the given places; its estimators' weights are random."""
    torch.manual_seed(0)
    model = Stacked(nn.LSTM, 1, True).double()
    zero = torch.zeros(1, 2, 4, dtype=torch.double)
    args = torch.randn(2, 3, 3, dtype=torch.double), (zero, zero)
    cut = dnifx.Recurrent("state", "1", **options)
    net = dnifx.decouple(model, [*cuts, cut], args=args, gradient=gradient, loss=nn.MSELoss())
    with torch.no_grad():
        for parameter in net.interface_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return net


def weights_after(net: dnifx.DecoupledModule, schedule: Any, steps: int = 3) -> list[Tensor]:
    """Train a copy of a module for some windows and return its weights."""
    torch.manual_seed(1)
    trainer = copy.deepcopy(net).trainer(sgd, schedule)
    for _ in range(steps):
        x, target = torch.randn(2, 3, 3, dtype=torch.double), torch.randn(2, 3, 2, dtype=torch.double)
        trainer.step(x, target=target)
    return list(trainer.net.parameters())


def test_the_boundary_in_time_is_printed_behind_the_others_and_drawn() -> None:
    whole, cut = decoupled(), decoupled("core")
    assert str(whole.program.schedule) == "F0 S0 B0 T0 M0 U0"
    assert str(cut.program.schedule) == "F0 S0 S1 B0 T1 M1 U0 F1 B1 T0 M0 U1"
    drawn = str(schedules.grid(cut.program.schedule, cut.program))  # type: ignore[arg-type]
    assert all(action in drawn for action in ("S1", "T1", "M1"))
    costs = schedules.simulate(cut.program.schedule, cut.program)  # type: ignore[arg-type]
    assert {str(span.action) for span in costs.spans} >= {"S1", "T1", "M1"}


@pytest.mark.parametrize("cuts", [(), ("core",)], ids=["one partition", "two"])
@pytest.mark.parametrize("option", [{}, {"trace": 0.9}, {"auxiliary": True}, {"into_core": True}], ids=str)
def test_what_is_printed_parses_back_and_runs_alike(cuts: tuple[str, ...], option: dict[str, Any]) -> None:
    net = decoupled(*cuts, **({} if cuts else option))
    text = str(net.program.schedule)
    assert schedules.parse(text).actions == net.program.schedule.actions  # type: ignore[union-attr]
    assert all(map(torch.equal, weights_after(net, text), weights_after(net, "sequential")))


@pytest.mark.parametrize("cuts", [(), ("core",)], ids=["one partition", "two"])
def test_a_text_that_names_nothing_in_time_leaves_it_at_its_place(cuts: tuple[str, ...]) -> None:
    net = decoupled(*cuts)
    boundary = len(net.boundaries)
    text = " ".join(word for word in str(net.program.schedule).split() if word not in {f"{k}{boundary}" for k in "STM"})
    assert text != str(net.program.schedule)
    assert all(map(torch.equal, weights_after(net, text), weights_after(net, "sequential")))


def test_fits_are_left_out_in_time_too() -> None:
    net = decoupled()
    found = weights_after(net, schedules.fit_every(100))
    before, once = list(net.interface_parameters()), weights_after(net, "sequential", steps=1)
    count = len(before)
    assert not all(map(torch.equal, found[-count:], before))
    trainer = copy.deepcopy(net).trainer(sgd, schedules.fit_every(100))
    assert str(trainer.source.at(1, net.program)) == "F0 S0 B0 U0"
    torch.manual_seed(1)
    for _ in range(3):
        trainer.step(torch.randn(2, 3, 3, dtype=torch.double), target=torch.randn(2, 3, 2, dtype=torch.double))
    assert all(map(torch.equal, list(trainer.net.interface_parameters()), once[-count:]))


@pytest.mark.parametrize(
    "schedule", ["backprop", schedules.warm_up(2), schedules.random_order(0.5), schedules.alternate(1, 1)]
)
def test_other_schedules_run(schedule: Any) -> None:
    net = decoupled("core")
    assert all(torch.isfinite(weight).all() for weight in weights_after(net, schedule, steps=5))


@settings(max_examples=8)
@given(recurrent_cases())
def test_every_recurrent_model_has_a_valid_schedule(case: Case) -> None:
    program = case.decouple().program
    assert program.schedule is not None
    schedules.validate(program.schedule, program)
    assert {str(action)[0] for action in program.schedule.actions} == set("FSBTMU")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F0 B0 S0 T0 M0 U0", r"it needs S0 \(estimate at boundary 0, 'state'\) before it"),
        ("F0 S0 T0 B0 M0 U0", r"it needs B0 \(backward of partition 0\) before it"),
        ("F0 S0 B0 M0 T0 U0", r"it needs T0 \(target of boundary 0, 'state'\) before it"),
        ("F0 S0 B0 T0 U0", "M0 .fit at boundary 0, 'state'. is missing"),
        ("F0 S0 B0 T0 M0 U0 M1", "there is no boundary 1: the program has 1, numbered from 0"),
    ],
)
def test_a_wrong_order_in_time_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        decoupled().trainer(sgd, text)


def test_the_core_is_updated_after_a_fit_that_reaches_it() -> None:
    with pytest.raises(ScheduleError, match="it needs M0"):
        decoupled(into_core=True).trainer(sgd, "F0 S0 B0 U0 T0 M0")
    decoupled().trainer(sgd, "F0 S0 B0 U0 T0 M0")


def test_nothing_is_fitted_where_nothing_learns_and_nothing_named_where_windows_wait() -> None:
    assert str(decoupled(gradient="zero").program.schedule) == "F0 S0 B0 U0"
    with pytest.raises(ScheduleError, match="nothing on boundary 0 is fitted"):
        decoupled(gradient="zero").trainer(sgd, "F0 S0 B0 T0 M0 U0")
    assert str(decoupled(gradient="oracle").program.schedule) == "F0 B0 U0"
