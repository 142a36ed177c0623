"""The trainer: optimizers, schedulers, losses, state, diagnostics, and what is said of wrong ones."""

import io
import math
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import dnifx
from dnifx.errors import InputError, LossError, OptimizerError, ScheduleError, StateError
from dnifx.estimators import BoundarySpec, Synthetic
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.training.trainer import Trainer
from tests.passes.programs import Tied, mlp

Parameters = Iterable[nn.Parameter]
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def sgd(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


class Ones(nn.Module):
    """Answers 1 for every value."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(torch.ones_like(value) for value in values)


def make_net(loss: Any = F.cross_entropy, cuts: Any = ("1", "3"), **options: Any) -> DecoupledModule:
    return dnifx.decouple(mlp(6, 8, 8, 3), list(cuts), args=(X,), loss=loss, **options)


def weights(net: nn.Module) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_step_returns_loss_and_output_and_computes_no_diagnostics(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    expected = net.original(X)
    trainer = net.trainer(sgd)
    result = trainer.step(X, target=Y)
    assert torch.equal(result.output, expected)
    assert result.loss is not None
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, F.cross_entropy(expected, Y))
    assert result.diagnostics == {}
    source = net.emitters.step(
        net.program, trainer.source.at(0, net.program), True, False, (), 0, False, False, (), False
    )
    assert "compare(" not in source
    diagnosing = net.emitters.step(
        net.program, trainer.source.at(0, net.program), True, True, (), 0, False, False, (), False
    )
    assert "compare(" in diagnosing


def test_every_partition_has_an_optimizer_with_its_own_parameters() -> None:
    net = make_net()
    trainer = net.trainer(sgd)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    owned = {
        name: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for name, optimizer in trainer.optimizers.items()
    }
    assert owned == {
        "submod_0": {"0.weight", "0.bias"},
        "submod_1": {"2.weight", "2.bias"},
        "submod_2": {"4.weight", "4.bias"},
    }
    assert set(trainer.estimator_optimizers) == {"cut_1", "cut_3"}


def test_a_partition_or_boundary_with_nothing_to_learn_has_no_optimizer() -> None:
    net = dnifx.decouple(
        mlp(6, 8, 3), ["0", "1"], args=(X,), loss=F.cross_entropy, gradient={"0": "zero", "1": "stale"}
    )
    trainer = net.trainer(sgd)
    assert set(trainer.optimizers) == {"submod_0", "submod_2"}
    assert set(trainer.estimator_optimizers) == {"cut_1"}
    trainer.step(X, target=Y)


def test_optimizers_by_partition_and_for_estimators() -> None:
    names = ("submod_0", "submod_1", "submod_2")
    trainer = make_net().trainer(dict(zip(names, (sgd, adam, sgd), strict=True)), estimator_optimizer=adam)
    assert [type(trainer.optimizers[name]).__name__ for name in names] == ["SGD", "Adam", "SGD"]
    assert {type(item).__name__ for item in trainer.estimator_optimizers.values()} == {"Adam"}
    trainer = make_net().trainer(sgd, estimator_optimizer={"cut_1": adam, "cut_3": sgd})
    assert type(trainer.estimator_optimizers["cut_1"]).__name__ == "Adam"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"optimizer": {"submod_0": sgd}},
            r"optimizer= does not cover its groups exactly: missing 'submod_1', 'submod_2', unknown none",
        ),
        (
            {"optimizer": dict.fromkeys(("submod_0", "submod_1", "submod_2", "head"), sgd)},
            r"missing none, unknown 'head'; the groups are 'submod_0'",
        ),
        ({"optimizer": sgd, "estimator_optimizer": {"cut_1": sgd}}, r"estimator_optimizer= .*missing 'cut_3'"),
        ({"optimizer": sgd, "lr_scheduler": {"submod_0": StepLR}}, r"lr_scheduler= .*missing 'submod_1', 'submod_2'"),
        ({"optimizer": 0.1}, r"optimizer=0.1: give a callable, or a mapping from names to callables"),
        (
            {"optimizer": lambda parameters: 0.1},
            r"optimizer= gave float for submod_0; give a callable from parameters to an optimizer",
        ),
    ],
)
def test_optimizers_that_do_not_cover_the_groups_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptimizerError, match=text):
        make_net().trainer(**options)


def test_learning_rates_follow_their_schedulers_after_every_step() -> None:
    def halve(optimizer: torch.optim.Optimizer) -> StepLR:
        return StepLR(optimizer, 2, gamma=0.5)

    trainer = make_net().trainer(sgd, lr_scheduler=halve)
    rates = []
    for _ in range(5):
        rates.append(trainer.optimizers["submod_1"].param_groups[0]["lr"])
        trainer.step(X, target=Y)
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025]
    assert trainer.estimator_optimizers["cut_1"].param_groups[0]["lr"] == 0.025


def test_a_step_is_its_computation_and_its_advance() -> None:
    def halve(optimizer: torch.optim.Optimizer) -> StepLR:
        return StepLR(optimizer, 2, gamma=0.5)

    one, other = make_net(), make_net()
    other.load_state_dict(one.state_dict())
    schedule = "random_order{p=0.5,seed=3}"
    whole, halves = (net.trainer(adam, schedule, lr_scheduler=halve) for net in (one, other))
    for _ in range(5):
        wanted, found = whole.step(X, target=Y), halves.compute(X, target=Y)
        assert halves.steps == whole.steps - 1
        halves.advance()
        assert (found.loss is None) == (wanted.loss is None)
    assert halves.steps == whole.steps
    assert halves.optimizers["submod_0"].param_groups[0]["lr"] == 0.0025
    assert same(weights(one), weights(other))


def test_a_mapping_of_schedulers_names_partitions_and_estimators_if_it_likes() -> None:
    def halve(optimizer: torch.optim.Optimizer) -> StepLR:
        return StepLR(optimizer, 1, gamma=0.5)

    names = ("submod_0", "submod_1", "submod_2", "cut_3")
    trainer = make_net().trainer(sgd, lr_scheduler=dict.fromkeys(names, halve))
    trainer.step(X, target=Y)
    rates = {name: o.param_groups[0]["lr"] for name, o in (trainer.optimizers | trainer.estimator_optimizers).items()}
    assert rates == {"submod_0": 0.05, "submod_1": 0.05, "submod_2": 0.05, "cut_3": 0.05, "cut_1": 0.1}


def test_a_cut_that_bears_a_partitions_name_has_a_scheduler_of_its_own() -> None:
    model = nn.Sequential()
    model.add_module("submod_0", nn.Linear(6, 6))
    model.add_module("last", nn.Linear(6, 3))
    net = dnifx.decouple(model, ["submod_0"], args=(X,), loss=F.cross_entropy)
    trainer = net.trainer(sgd, lr_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert set(trainer.lr_schedulers) == {"submod_0", "submod_1", "cut_submod_0"}


def test_each_partition_is_updated_before_the_next_runs_forward() -> None:
    net = make_net()
    order: list[str] = []
    for index in ("0", "2", "4"):
        net.get_submodule(index).register_forward_pre_hook(lambda module, args, index=index: order.append(f"F{index}"))

    def noted(name: str) -> Callable[[Parameters], torch.optim.Optimizer]:
        def make(parameters: Parameters) -> torch.optim.Optimizer:
            optimizer = sgd(parameters)
            optimizer.register_step_pre_hook(lambda *args: order.append(f"U{name}"))
            return optimizer

        return make

    trainer = net.trainer({f"submod_{n}": noted(str(2 * n)) for n in range(3)}, estimator_optimizer=sgd)
    order.clear()
    trainer.step(X, target=Y)
    assert order == ["F0", "U0", "F2", "U2", "F4", "U4"]


def test_saved_and_loaded_it_goes_on_bit_for_bit() -> None:
    def run(trainer: Trainer, net: DecoupledModule, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            losses.append(float(trainer.step(x, target=Y).loss or 0.0))
        return losses

    def make() -> tuple[DecoupledModule, Trainer]:
        net = make_net()
        return net, net.trainer(
            adam, lr_scheduler=lambda o: StepLR(o, 2, gamma=0.7), schedule="random_order{p=0.5,seed=3}"
        )

    net, trainer = make()
    run(trainer, net, 0, 4)
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    expected = run(trainer, net, 4, 9)
    file.seek(0)
    other, resumed = make()
    run(resumed, other, 20, 23)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.steps == 4
    assert run(resumed, other, 4, 9) == expected
    assert same(weights(net), weights(other))


def test_a_state_of_another_trainer_is_refused() -> None:
    trainer = make_net().trainer(adam)
    other = make_net(cuts=["1"]).trainer(adam)
    with pytest.raises(
        StateError,
        match=r"has optimizers for \['submod_0', 'submod_1'\], this trainer for \['submod_0', 'submod_1', 'su",
    ):
        trainer.load_state_dict(other.state_dict())
    wider = dnifx.decouple(mlp(6, 9, 8, 3), ["1", "3"], args=(X,), loss=F.cross_entropy).trainer(adam)
    partial = trainer.state_dict()
    del partial["schedule"], partial["steps"]
    with pytest.raises(
        StateError, match=r"the saved state lacks schedule, steps; give what trainer.state_dict\(\) returned"
    ):
        trainer.load_state_dict(partial)
    with pytest.raises(StateError, match="the saved weights do not fit this module"):
        trainer.load_state_dict(wider.state_dict())


def test_a_loss_that_is_not_a_number_stops_the_step_before_what_depends_on_it() -> None:
    net = make_net(F.mse_loss)
    before = weights(net.get_submodule("4"))
    trainer = net.trainer(sgd)
    with pytest.raises(
        LossError, match=r"the loss of step 0 is nan: nothing that depends on it was updated; look at the inputs"
    ):
        trainer.step(X, target=torch.full((8, 3), math.nan))
    assert same(weights(net.get_submodule("4")), before)
    assert trainer.steps == 0
    assert math.isfinite(float(trainer.step(X, target=torch.zeros(8, 3)).loss or 0.0))


def test_a_step_that_failed_leaves_no_gradient_behind() -> None:
    net, other = (dnifx.decouple(Tied(), ["first"], args=(X,), loss=F.mse_loss, gradient=Ones) for _ in range(2))
    trainer, expected = net.trainer(sgd), other.trainer(sgd)
    with pytest.raises(LossError):
        trainer.step(X, target=torch.full((8, 6), math.inf))
    assert all(parameter.grad is None for parameter in net.parameters())
    net.load_state_dict(other.state_dict())
    trainer.step(X, target=X)
    expected.step(X, target=X)
    assert same(weights(net), weights(other))


@pytest.mark.parametrize(
    ("loss", "target", "text"),
    [
        (
            F.cross_entropy,
            Y[:5],
            r"(?s)the loss cannot be computed: ValueError: .*\(8\).*output: tensor \(8, 3\) of torch.float32\n  target: tensor \(5,\)",
        ),
        (F.mse_loss, torch.zeros(8), r"(?s)the loss cannot be computed: \w+: .*target: tensor \(8,\) of torch.float32"),
        (F.cross_entropy, Y + 2, r"the loss cannot be computed: IndexError: Target \d is out of bounds"),
        (F.cross_entropy, "labels", r"(?s)the loss cannot be computed: TypeError.*target: str"),
        (lambda output, target: 3.0, Y, r"the loss gave float; expected a scalar tensor or one loss an example"),
        (
            lambda output, target: (output.argmax(1) != target).float().mean(),
            Y,
            r"the loss carries no gradient, so nothing can learn",
        ),
        (lambda output, target: output, Y, r"the loss gave tensor \(8, 3\) of torch.float32; expected a scalar"),
    ],
)
def test_a_loss_that_cannot_be_computed_says_what_it_was_given(loss: Any, target: Any, text: str) -> None:
    with pytest.raises(LossError, match=text):
        make_net(loss).trainer(sgd).step(X, target=target)


def summed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


def test_a_loss_that_sums_is_found_out() -> None:
    with pytest.raises(
        LossError, match=r"the loss sums over examples, but the interfaces were made for a mean: .*reduction='sum'"
    ):
        make_net(summed).trainer(sgd).step(X, target=Y)
    make_net(summed, reduction="sum").trainer(sgd).step(X, target=Y)


@pytest.mark.parametrize(
    ("loss", "reduction", "mean"),
    [
        (nn.CrossEntropyLoss(), None, True),
        (nn.CrossEntropyLoss(reduction="sum"), None, False),
        (nn.CrossEntropyLoss(reduction="none"), None, True),
        (F.cross_entropy, "sum", False),
        (F.cross_entropy, None, True),
    ],
)
def test_the_reduction_is_what_the_loss_says(loss: Any, reduction: str | None, mean: bool) -> None:
    assert make_net(loss, reduction=reduction).mean is mean


def test_a_reduction_that_contradicts_the_loss_is_refused() -> None:
    with pytest.raises(LossError, match="reduction='mean', but the loss says reduction='sum'; make them agree"):
        make_net(nn.CrossEntropyLoss(reduction="sum"), reduction="mean")
    with pytest.raises(LossError, match="reduction='none': give 'mean', 'sum' or None"):
        make_net(reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_loss_an_example_is_reduced_as_the_reduction_says(reduction: str) -> None:
    def each(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    def whole(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction=reduction)

    nets = [make_net(loss, reduction=reduction) for loss in (each, whole)]
    for net in nets:
        trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
        for _ in range(3):
            result = trainer.step(X, target=Y)
    assert result.loss is not None
    for one, other in zip(weights(nets[0]), weights(nets[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_diagnostics_are_those_of_an_independent_computation(reduction: str) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction=reduction)

    net = make_net(loss, cuts=["1"], reduction=reduction, gradient=Synthetic(hidden=0))
    with torch.no_grad():
        for parameter in net.interface_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    model: Any = net.original
    h = torch.relu(model[0](X)).detach().requires_grad_()
    estimate = net.program.interfaces[0].estimator((h.detach(),))[0].detach()
    target = torch.autograd.grad(F.cross_entropy(model[4](torch.relu(model[2](h))), Y, reduction="sum"), h)[0]
    found = net.trainer(sgd).step(X, target=Y, diagnose=True).diagnostics["1"]
    dots = (estimate * target).sum(1) / (estimate.norm(dim=1) * target.norm(dim=1))
    expected = {
        "cosine": dots.mean(),
        "relative_error": (estimate - target).norm() / target.norm(),
        "wrong_signs": ((estimate * target <= 0) & (target != 0)).sum() / (target != 0).sum(),
        "estimate_norm": estimate.norm(dim=1).square().mean().sqrt(),
        "target_norm": target.norm(dim=1).square().mean().sqrt(),
    }
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", ["synthetic", "zero", "stale"])
def test_diagnosing_changes_nothing_else(gradient: str) -> None:
    one, other = make_net(gradient=gradient), make_net(gradient=gradient)
    other.load_state_dict(one.state_dict())
    for net, diagnose in ((one, False), (other, True)):
        trainer = net.trainer(adam)
        for _ in range(3):
            result = trainer.step(X, target=Y, diagnose=diagnose)
    assert set(result.diagnostics) == {"1", "3"}
    assert same(weights(one), weights(other))


def test_a_value_without_features_is_diagnosed_too() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 1), nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(torch.tanh(self.first(x).squeeze(1)).unsqueeze(1))
            return result

    net = dnifx.decouple(Narrow(), ["tanh"], args=(X,), loss=F.cross_entropy, gradient="stale")
    assert net.trainer(sgd).step(X, target=Y, diagnose=True).diagnostics["tanh"]["relative_error"] == 1


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ("sequentiel", "There is no schedule 'sequentiel'; nearest: 'sequential'"),
        ("F0 F1 X2", "X2"),
        ("F0 S0 B0 U0", "."),
        (3, "int is not a schedule"),
        ("random_order{q=0.5}", "The schedule 'random_order{q=0.5}': missing a required argument: 'p'"),
    ],
)
def test_a_schedule_that_cannot_be_run_is_refused_before_anything_runs(schedule: Any, text: str) -> None:
    net = make_net()
    before = weights(net)
    with pytest.raises(ScheduleError, match=text):
        net.trainer(sgd, schedule=schedule)
    assert same(weights(net), before)


def test_the_programs_own_schedule_as_text_does_the_same() -> None:
    one, other = make_net(), make_net()
    other.load_state_dict(one.state_dict())
    one.trainer(sgd).step(X, target=Y)
    other.trainer(sgd, schedule=str(other.program.schedule)).step(X, target=Y)
    assert same(weights(one), weights(other))


def test_an_error_in_a_step_shows_the_generated_line() -> None:
    net = make_net()
    with pytest.raises(
        InputError, match=r"input_1 is torch.float32 \[8, 5\] on cpu, and was torch.float32 \[8, 6\]"
    ) as caught:
        net.trainer(sgd).step(torch.randn(8, 5), target=Y)
    cause = caught.value.__cause__
    assert cause is not None
    lines = [entry.line for entry in traceback.extract_tb(cause.__traceback__) if "dnifx step" in entry.filename]
    assert any("self.submod_0(" in str(line) for line in lines)
