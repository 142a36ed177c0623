"""A trainer with a gradient scaler and under autocast: scaled by powers of two it trains as unscaled, bit for bit."""

import copy
import itertools
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import estimators
from dnifx.errors import LossError, OptimizerError, StateError
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.cases import Bent, Case, cases, decoupled
from tests.contracts.test_estimators_everywhere import CHOICES, make_net
from tests.runtime.test_own_losses import Bayesian, Experts, made, own

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
SCALES = (2.0**10, 0.125)


def scaler(scale: float, **options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def net_of(gradient: Any = None, **options: Any) -> DecoupledModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    gradient = gradient if gradient is not None else estimators.Synthetic(hidden=0)
    net = dnifx.decouple(model, ["1", "3"], args=(X,), loss=cross_entropy, gradient=gradient, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.interface_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = itertools.zip_longest(one.state_dict().values(), two.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


def check_equal(nets: tuple[DecoupledModule, DecoupledModule], scale: float, steps: Any, **options: Any) -> None:
    """The steps of a scaled and of an unscaled trainer leave the same."""
    for net, given_scaler in zip(nets, (None, scaler(scale)), strict=True):
        trainer = net.trainer(sgd, scaler=given_scaler, **options)
        torch.manual_seed(2)
        steps(trainer)
    assert same(*nets)


def four_steps(trainer: dnifx.Trainer) -> None:
    for _ in range(4):
        trainer.step(X, target=Y)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(CHOICES))
def test_every_estimator_trains_as_unscaled(name: str, scale: float) -> None:
    (one, x, y), (two, _, _) = make_net(name), make_net(name)
    check_equal((one, two), scale, lambda trainer: [trainer.step(x, target=y) for _ in range(4)])


OPTIONS: Mapping[str, dict[str, Any]] = {
    "clip": {"clip": 0.1},
    "accumulate": {"accumulate": 2},
    "lag": {"lag": 1},
    "penalty": {"penalty": lambda named: 0.1 * sum(each.square().sum() for each in named.values())},
    "a schedule of chance": {"schedule": "random_order{p=0.5}"},
    "replicas": {"replicas": "average"},
    "several optimizers": {"estimator_optimizer": lambda p: [sgd(p[:1]), torch.optim.Adam(p[1:])]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_goes_with_all_that_a_trainer_does(name: str) -> None:
    check_equal((net_of(), net_of()), 2.0**10, four_steps, **OPTIONS[name])


@pytest.mark.parametrize("scale", SCALES)
def test_late_averages_move_as_unscaled(scale: float) -> None:
    check_equal((net_of("stale"), net_of("stale")), scale, four_steps, lag=1)


def test_synthetic_inputs_are_fitted_as_unscaled() -> None:
    nets = net_of(inputs="synthetic"), net_of(inputs="synthetic")
    check_equal(nets, 2.0**10, four_steps, schedule="unlocked{p=0.5}")


def test_own_losses_are_scaled_too() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    nets = []
    for _ in range(2):
        model = made([Experts, Bayesian])
        nets.append(dnifx.decouple(model, ["0", "1"], args=(x,), loss=nn.functional.mse_loss, gradient=Bent))
    target = torch.zeros(6, 2).double()
    check_equal(
        (nets[0], nets[1]),
        2.0**10,
        lambda trainer: [trainer.step(x, target=target) for _ in range(3)],
        own_losses=own(nets[0].original),
    )


WINDOWS: Mapping[str, dnifx.Recurrent] = {
    "a state": dnifx.Recurrent("h", "1"),
    "a trace": dnifx.Recurrent("h", "1", trace=0.5),
    "an auxiliary head": dnifx.Recurrent("h", "1", auxiliary=True),
}


class Windows(nn.Module):
    """A recurrent model."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for each in x.unbind(1):
            h = self.cell(each, h)
        return self.out(h), h


@pytest.mark.parametrize("name", WINDOWS)
def test_states_in_time_are_fitted_as_unscaled(name: str) -> None:
    x, h = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 4)
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        made_net = dnifx.decouple(
            Windows(),
            [WINDOWS[name]],
            args=(x, h),
            loss=cross_entropy,
            gradient=estimators.SyntheticState(hidden=0),
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in made_net.interface_parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        nets.append(made_net)
    check_equal((nets[0], nets[1]), 2.0**10, lambda trainer: [trainer.step(x, target=Y) for _ in range(4)])


@settings(max_examples=20)
@given(case=cases(training=True), scale=st.sampled_from(SCALES))
def test_any_model_trains_as_unscaled(case: Case, scale: float) -> None:
    nets = decoupled(case, Bent), decoupled(case, Bent)
    check_equal(nets, scale, lambda trainer: [trainer.step(*case.inputs, target=case.target) for _ in range(2)])


class Steep(torch.autograd.Function):
    """Passes a value on; its gradient is so large that a scaled one overflows."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2.0**100


class Overflowing(nn.Module):
    """A layer whose gradient overflows where the loss is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.steep = True

    def forward(self, x: Tensor) -> Tensor:
        return Steep.apply(x) if self.steep else x  # type: ignore[no-untyped-call,no-any-return]


def test_an_overflow_leaves_out_its_own_update_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Overflowing(), nn.Tanh(), nn.Linear(8, 3))
    net = dnifx.decouple(model, ["3"], args=(X,), loss=cross_entropy, gradient=estimators.Synthetic(hidden=0))
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    plain = copy.deepcopy(net)
    trainer = net.trainer(sgd, scaler=scaler(2.0**60))
    before = copy.deepcopy(net.state_dict())
    result = trainer.step(X, target=Y)
    after = net.state_dict()
    assert set(result.skipped) == {"submod_0"}
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["4.weight"], after["4.weight"])
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"]), "what went forward was finite"
    plain.trainer(sgd).step(X, target=Y)
    assert torch.equal(plain.state_dict()["4.weight"], after["4.weight"])
    assert trainer.scaling is not None
    assert trainer.scaling.scaler.get_scale() == 2.0**59, "updated once"


def test_a_gradient_that_no_scale_made_too_large_is_an_error() -> None:
    def broken(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) + (0 * output).sqrt().sum()

    net = net_of()
    net = dnifx.decouple(net.original, ["1"], args=(X,), loss=broken, gradient="zero")
    trainer = net.trainer(sgd, scaler=scaler(4.0))
    for _ in range(2):
        assert trainer.step(X, target=Y).skipped
    with pytest.raises(LossError, match="is not finite"):
        trainer.step(X, target=Y)


def test_it_grows_and_goes_on_from_a_saved_state() -> None:
    whole, halves = (net_of().trainer(sgd, scaler=scaler(4.0, growth_interval=2)) for _ in range(2))
    for _ in range(5):
        whole.step(X, target=Y)
    for _ in range(3):
        halves.step(X, target=Y)
    state = copy.deepcopy(halves.state_dict())
    resumed = copy.deepcopy(net_of().trainer(sgd, scaler=scaler(1.0, growth_interval=2)))
    resumed.load_state_dict(state)
    for _ in range(2):
        resumed.step(X, target=Y)
    assert same(whole.net, resumed.net)
    assert whole.scaling is not None
    assert resumed.scaling is not None
    assert whole.scaling.scaler.state_dict() == resumed.scaling.scaler.state_dict()
    assert whole.scaling.scaler.get_scale() == 16.0
    with pytest.raises(StateError, match="with a gradient scaler"):
        net_of().trainer(sgd).load_state_dict(state)


def test_a_step_that_breaks_off_leaves_the_scaler_ready() -> None:
    net = net_of()
    trainer = net.trainer(sgd, scaler=scaler(4.0))
    trainer.step(X, target=Y)
    with pytest.raises(dnifx.DnifxError):
        trainer.step(X, target=Y[:3])
    trainer.step(X, target=Y)
    assert trainer.scaling is not None
    assert trainer.scaling.scaler.get_scale() == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_a_plain_loop(dtype: torch.dtype) -> None:
    net = net_of(estimators.Oracle())
    plain = copy.deepcopy(net.original)
    trainer = net.trainer(sgd, autocast=dtype, scaler=scaler(2.0**8), clip=None)
    optimizer, plain_scaler = sgd(plain.parameters()), scaler(2.0**8)
    for _ in range(3):
        result = trainer.step(X, target=Y)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(plain(X), Y)
        plain_scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        plain_scaler.step(optimizer)
        plain_scaler.update()
        assert result.output.dtype == dtype
        assert result.loss is not None
        assert torch.equal(result.loss, loss.detach())
    assert same(plain, net.original)


def test_backward_passes_and_updates_are_outside_autocast() -> None:
    seen: list[bool] = []

    class Watching(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return gradient

    def watched(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(Watching.apply(output), target)  # type: ignore[no-untyped-call]

    net = dnifx.decouple(net_of().original, ["1"], args=(X,), loss=watched, gradient="zero")
    net.trainer(sgd, autocast=torch.bfloat16).step(X, target=Y)
    assert seen == [False]


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "no scaler": ({"scaler": 1024.0}, "give a gradient scaler"),
    "no dtype": ({"autocast": "bf16"}, "give torch.bfloat16"),
    "a whole number": ({"autocast": torch.int8}, "give torch.bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_scaler_or_dtype_is_refused(name: str) -> None:
    options, text = REFUSED[name]
    with pytest.raises(OptimizerError, match=text):
        net_of().trainer(sgd, **options)


def test_parameters_in_half_precision_are_refused() -> None:
    net = dnifx.decouple(
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).half(), ["0"], args=(X.half(),), loss=nn.MSELoss()
    )
    with pytest.raises(OptimizerError, match="parameters in float16"):
        net.trainer(sgd, scaler=scaler(4.0))


def test_a_trainer_in_half_precision_can_be_pickled_and_copied() -> None:
    net = net_of("synthetic", reduction="mean")
    trainer = net.trainer(torch.optim.Adam, autocast=torch.float16, scaler=scaler(4.0))
    trainer.step(X, target=Y)
    for other in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
        fresh = copy.deepcopy(trainer)
        for each in (other, fresh):
            torch.manual_seed(0)
            each.step(X, target=Y)
        assert same(other.net, fresh.net)


def test_a_scaler_that_is_off_scales_nothing() -> None:
    nets = net_of(), net_of()
    four_steps(nets[0].trainer(sgd))
    trainer = nets[1].trainer(sgd, scaler=GradScaler("cpu", enabled=False))
    four_steps(trainer)
    assert trainer.scaling is None
    assert same(*nets)
