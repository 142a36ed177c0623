"""Probes against the true gradient, and the watch that warns where a synthetic gradient does harm."""

import json
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import Watch, schedules
from dnifx.errors import DnifxWarning, HarmWarning, LossError, OptionError, StateError
from dnifx.estimators import BoundarySpec, BPLambda, Synthetic
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted.fitting import compare
from tests.schedules.schedule_programs import programs


class Known(nn.Module):
    """An estimator whose answer the test gives."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.zeros(spec.values[0].shape[1:], dtype=spec.values[0].dtype))

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.answer.expand_as(values[0]),)


def make_net(gradient: Any = Known, dropout: float = 0.3, **options: Any) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout)),
        *(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    ).double()
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    net = dnifx.decouple(model, ["2", "5"], args=(x,), gradient=gradient, loss=cross_entropy, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.interface_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return net, x, y


def make_trainer(net: DecoupledModule, schedule: Any = "sequential") -> dnifx.Trainer:
    return net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.01), schedule)


def backprop_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of each example's loss at the two cuts, by plain backpropagation."""
    value = x
    values = []
    for name, layer in model.named_children():
        value = layer(value)
        if name in ("2", "5"):
            values.append(value)
    return [gradient * len(x) for gradient in torch.autograd.grad(cross_entropy(value, y), values)]


def test_a_probe_compares_with_the_true_gradient_and_with_the_target() -> None:
    net, x, y = make_net()
    torch.manual_seed(3)
    found = make_trainer(net).probe(x, target=y)
    torch.manual_seed(3)
    true = backprop_gradients(net.original, x, y)
    answers = [
        item.estimator.get_parameter("answer").expand_as(g)
        for item, g in zip(net.program.interfaces, true, strict=True)
    ]
    for name, answer, gradient in zip(("2", "5"), answers, true, strict=True):
        assert set(found.true[name]) == {*compare([answer], [gradient]), "parameter_cosine"}
        for key, number in compare([answer], [gradient]).items():
            torch.testing.assert_close(found.true[name][key], number)
    torch.manual_seed(3)
    told = make_trainer(net).step(x, target=y, diagnose=True)
    assert told.loss is not None
    torch.testing.assert_close(found.loss, told.loss)
    assert list(found.true) == list(found.bootstrapped) == ["2", "5"]
    for name in ("2", "5"):
        for key, number in told.diagnostics[name].items():
            torch.testing.assert_close(found.bootstrapped[name][key], number)
    for key, number in found.true["5"].items():
        torch.testing.assert_close(number, found.bootstrapped["5"][key])
    assert found.true["2"]["relative_error"] != found.bootstrapped["2"]["relative_error"]


@pytest.mark.parametrize("inputs", [None, "synthetic"])
@pytest.mark.parametrize(
    "gradient", [Synthetic(), BPLambda(0.5), "stale", "sobolev", "direct_feedback", "oracle", "prop"]
)
def test_a_probe_leaves_everything_as_it_was(gradient: Any, inputs: str | None) -> None:
    options: dict[str, Any] = {"context": "label", "num_classes": 3}
    if inputs is not None and gradient in (BPLambda(0.5), "oracle", "prop"):
        return
    net, x, y = make_net(gradient, inputs=inputs, **options)
    trainer = make_trainer(net)
    trainer.step(x, target=y)
    next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizers = [json.dumps(str(item.state_dict())) for item in trainer.optimizers.values()]
    gradients = [None if item.grad is None else item.grad.clone() for item in net.parameters()]
    random, steps = torch.get_rng_state(), trainer.steps
    found = trainer.probe(x, target=y)
    assert set(found.true) == set(found.bootstrapped) == {"2", "5"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert optimizers == [json.dumps(str(item.state_dict())) for item in trainer.optimizers.values()]
    for parameter, gradient_before in zip(net.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient_before is None)
        assert gradient_before is None or torch.equal(gradient_before, parameter.grad)  # type: ignore[arg-type]
    assert torch.equal(random, torch.get_rng_state())
    assert steps == trainer.steps


def test_a_probe_puts_things_back_where_it_fails() -> None:
    net, x, y = make_net()
    trainer = make_trainer(net)
    trainer.step(x, target=y)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(LossError, match="out of bounds"):
        trainer.probe(x, target=y + 7)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@settings(max_examples=50)
@given(programs())
def test_the_schedules_of_a_probe_update_nothing_and_are_in_order(program: dnifx.ir.Program) -> None:
    for true in (True, False):
        schedule = schedules.probing(program, true)
        kinds = {action.kind for action in schedule.actions}
        assert kinds <= set("FSBT")
        whole = {*schedules.sequential(program, diagnose=True).actions}
        assert {action for action in whole if action.kind == "T"} <= set(schedule.actions)
        if true:
            assert all(answer == "target" for answer in schedules.answers(schedule, program).values())


def look(cosine: float = 0.5, norm: float = 1.0) -> dict[str, dict[str, Tensor]]:
    numbers = {"cosine": cosine, "relative_error": 0.8, "wrong_signs": 0.25, "estimate_norm": norm, "target_norm": 1.0}
    return {"layer": {name: torch.tensor(number) for name, number in numbers.items()}}


def test_a_watch_warns_once_where_an_estimate_points_away() -> None:
    watch = Watch(patience=3, decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cosine in (-0.5, -0.5, 0.1, -0.5, -0.5):
            watch.see(look(cosine))
    with pytest.warns(HarmWarning, match=r"'layer' points away.*-0\.50.*BPLambda") as caught:
        watch.see(look(-0.5))
    assert len(caught) == 1
    assert issubclass(HarmWarning, DnifxWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            watch.see(look(-0.5))


def test_a_watch_warns_where_the_norm_runs_away() -> None:
    watch = Watch(patience=2, growth=5.0, decay=0.0)
    watch.see(look(norm=6.0))
    with pytest.warns(HarmWarning, match="has run away: its norm is 6 times"):
        watch.see(look(norm=6.0))


def test_a_watch_says_by_itself_that_an_estimator_is_too_coarse_for_its_target() -> None:
    watch = Watch(patience=2, decay=0.0)
    for norm in (2.9, 3.1, 2.9):
        watch.see(look(cosine=0.02, norm=norm))
    watch.see(look(cosine=0.02, norm=3.1))
    with pytest.warns(HarmWarning, match=r"3\.1 times its target's.*too coarse.*lower the estimator_optimizer rate"):
        watch.see(look(cosine=0.02, norm=3.1))


def test_a_watch_is_quiet_where_nothing_is_estimated_yet() -> None:
    net, x, y = make_net(Synthetic())
    for parameter in net.interface_parameters():
        nn.init.zeros_(parameter)
    trainer, watch = make_trainer(net), Watch(patience=1)
    watch.see(trainer.step(x, target=y, diagnose=True).diagnostics)
    zero = look(0.0, 0.0)
    zero["layer"]["relative_error"] = torch.tensor(float("nan"))
    watch.see(zero)
    assert "layer: cosine 0.00, relative error nan" in str(watch)


def test_its_averages_forget_and_skip_what_is_no_number() -> None:
    watch = Watch(decay=0.5)
    for cosine in (1.0, 0.0, float("nan"), 1.0):
        watch.see(look(cosine))
    assert watch.averages["layer"]["cosine"] == 0.75
    assert str(watch) == "layer: cosine 0.75, relative error 0.80, wrong signs 25%"


def test_its_state_is_json_and_goes_on() -> None:
    watch, other = Watch(patience=3, decay=0.0), Watch(patience=3, decay=0.0)
    watch.see(look(-0.5))
    watch.see(look(-0.5))
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    with pytest.warns(HarmWarning):
        other.see(look(-0.5))
    with pytest.raises(StateError, match="state_dict"):
        other.load_state_dict({"averages": 1, "streaks": [], "warned": []})


@pytest.mark.parametrize("options", [{"patience": 0}, {"growth": 0.0}, {"cosine": 2.0}, {"decay": 1.0}])
def test_its_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="patience of 1"):
        Watch(**options)
