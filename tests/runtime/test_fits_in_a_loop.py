"""What a loop of one's own does with the fits: parameter groups, clipping, warnings, and a net that applies them itself."""

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import DnifxWarning, OptimizerError
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted.finite import not_finite
from dnifx.runtime.net import fits
from dnifx.runtime.net.fits import left

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def made(seed: int = 0, **options: Any) -> DecoupledModule:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return dnifx.decouple(model, ["1", "3"], args=(X,), gradient=dnifx.estimators.Synthetic(hidden=0), **options)


def backward(net: nn.Module, factor: float = 1.0) -> None:
    torch.autograd.backward(nn.functional.cross_entropy(net(X), Y) * factor)


def norm(parameters: Any) -> float:
    return float(nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]))


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_model_and_interface_parameters_are_all_parameters() -> None:
    net = made()
    own, theirs = [*map(id, net.model_parameters())], [*map(id, net.interface_parameters())]
    assert own == [*map(id, net.original.parameters())]
    assert {*own, *theirs} == {*map(id, net.parameters())}
    assert not {*own} & {*theirs}


@pytest.mark.parametrize("target", ["loop", "trainer"])
@pytest.mark.parametrize("gradient", ["local_loss", "critic", "sobolev", "suffix", "synthetic"])
@pytest.mark.parametrize("frozen", ["model", "estimators"])
def test_the_rate_of_estimators_is_that_of_every_head(gradient: str, target: str, frozen: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    labelled: Any = {} if gradient in ("suffix", "synthetic") else {"context": "label", "num_classes": 3}
    loss = nn.CrossEntropyLoss()
    net = dnifx.decouple(model, ["1", "3"], args=(X,), gradient=gradient, loss=loss, **labelled)
    lr, estimator_lr = (0.0, 0.1) if frozen == "model" else (0.1, 0.0)
    before = {name: each.detach().clone() for name, each in net.named_parameters()}
    if target == "loop":
        optimizer = torch.optim.SGD(net.parameter_groups(lr=lr, estimator_lr=estimator_lr), lr=0.5)
        told = {"context": Y} if net.program.context else {}
        told |= {"target": Y} if net.compares or net.foresees else {}
        for _ in range(2):
            torch.autograd.backward(loss(net(X, **told), Y))
            optimizer.step()
    else:
        rates = partial(torch.optim.SGD, lr=lr), partial(torch.optim.SGD, lr=estimator_lr)
        trainer = net.trainer(rates[0], estimator_optimizer=rates[1])
        for _ in range(2):
            trainer.step(X, target=Y)
    own = {id(each) for each in net.model_parameters()}
    moved = {name for name, each in net.named_parameters() if not torch.equal(each, before[name])}
    heads = {name for name, each in net.named_parameters() if id(each) not in own}
    if frozen == "model":
        assert moved == heads
    else:
        assert {"4.weight", "4.bias"} <= moved
        assert not moved & heads


def test_clipping_takes_the_model_alone() -> None:
    net = made()
    backward(net)
    before, fits = norm(net.model_parameters()), norm(net.interface_parameters())
    assert float(net.clip_grad_norm_(before / 2)) == pytest.approx(before)
    assert norm(net.model_parameters()) == pytest.approx(before / 2, rel=1e-4)
    assert norm(net.interface_parameters()) == fits


@pytest.mark.parametrize(
    ("given", "own", "theirs"),
    [
        ({}, {}, {"weight_decay": 0.0}),
        ({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.0}),
        ({"lr": 0.1, "estimator_lr": 0.2}, {"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.0}),
        ({"weight_decay": 0.5}, {"weight_decay": 0.5}, {"weight_decay": 0.0}),
        ({"estimator_weight_decay": 0.5}, {}, {"weight_decay": 0.5}),
    ],
)
def test_groups_keep_weight_decay_from_the_estimators(
    given: dict[str, float], own: dict[str, float], theirs: dict[str, float]
) -> None:
    net = made()
    groups = net.parameter_groups(**given)
    parameters = [group.pop("params") for group in groups]
    assert groups == [own, theirs]
    assert [*map(id, parameters[0])] == [*map(id, net.model_parameters())]
    assert [*map(id, parameters[1])] == [*map(id, net.interface_parameters())]
    torch.optim.AdamW(net.parameter_groups(**given))


def test_frozen_parameters_and_nets_without_estimators_are_left_out() -> None:
    net = made()
    net.get_submodule("0").requires_grad_(False)
    assert len(net.parameter_groups()[0]["params"]) == 4
    (group,) = dnifx.decouple(
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), ["0"], args=(X,), gradient="zero"
    ).parameter_groups()
    assert len(group["params"]) == 4


def loop(
    net: DecoupledModule, optimizer: torch.optim.Optimizer, clear: Callable[[], None], steps: int = 6
) -> list[str]:
    """Train, and return the warnings of dnifx."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            clear()
            backward(net)
            optimizer.step()
    return [str(each.message) for each in told if issubclass(each.category, DnifxWarning)]


def test_fits_that_nobody_applies_are_told_of_once() -> None:
    net = made()
    optimizer = sgd(net.original.parameters())
    (text,) = loop(net, optimizer, optimizer.zero_grad)
    assert "the estimators do not learn" in text
    assert "estimator_optimizer=" in text


@pytest.mark.parametrize("to_none", [True, False])
def test_a_loop_that_applies_its_fits_is_told_nothing(to_none: bool) -> None:
    net = made()
    optimizer = sgd(net.parameters())
    assert loop(net, optimizer, lambda: optimizer.zero_grad(set_to_none=to_none)) == []
    assert loop(net, optimizer, lambda: net.zero_grad(set_to_none=to_none)) == []


def test_gradients_are_looked_at_in_a_few_passes_alone(no_warning: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []

    def look(parameters: Any) -> bool:
        looks.append(left(parameters))
        return looks[-1]

    monkeypatch.setattr(fits, "left", look)
    net = made()
    net.loss_scale = 1.0
    for _ in range(fits.LOOKED + 9):
        backward(net)
    assert looks == [True] * fits.LOOKED, "a look waits for a GPU"


def test_two_calls_of_the_net_in_one_backward_pass_are_no_accumulation(no_warning: None) -> None:
    net = made()
    for _ in range(4):
        net.zero_grad()
        torch.autograd.backward(net(X).square().mean() + net(-X).square().mean())


def test_accumulation_is_told_of_once_unless_the_loop_says_its_factor() -> None:
    quiet, net = made(), made()
    quiet.loss_scale = 1.0
    for each, count in ((quiet, 0), (net, 1)):
        texts = loop(each, sgd(each.parameters()), lambda: None)
        assert len(texts) == count
        assert all("net.loss_scale = 1 / k" in text for text in texts)


def test_a_scaler_is_told_of_unless_the_loop_says_its_factor() -> None:
    quiet, net, scaler = made(), made(), torch.amp.GradScaler("cpu", init_scale=4.0)
    quiet.loss_scale = scaler
    for each, count in ((quiet, 0), (net, 1)):
        optimizer = sgd(each.parameters())
        texts = loop(each, optimizer, optimizer.zero_grad)
        assert len(texts) == count
        assert all("net.loss_scale = scaler" in text for text in texts)
    del scaler


@pytest.mark.parametrize("factor", [1.0, 2.0**16, 0.25])
def test_a_net_that_applies_its_fits_does_what_the_loop_would(factor: float, no_warning: None) -> None:
    own, other = made(estimator_optimizer=sgd), made()
    own.loss_scale = factor
    first, both = sgd(own.model_parameters()), sgd(other.parameters())
    for _ in range(3):
        own.zero_grad()
        other.zero_grad()
        backward(own, factor)
        backward(other)
        assert all(each.grad is None for each in own.interface_parameters())
        for each in own.model_parameters():
            each.grad = None if each.grad is None else each.grad / factor
        first.step()
        both.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("waits", [True, False], ids=["looked at", "as on a GPU"])
@pytest.mark.parametrize("optimizer", [sgd, torch.optim.Adam, partial(torch.optim.Adam, fused=True)])
@pytest.mark.parametrize(("inputs", "factor"), [(X * float("nan"), 1.0), (X, 3e38)])
def test_fits_that_are_not_finite_are_not_applied(
    inputs: Tensor, factor: float, optimizer: Any, waits: bool, no_warning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not waits:
        monkeypatch.setattr(fits, "not_finite", lambda gradients: torch.tensor(not_finite(gradients)))
    net, twin = made(estimator_optimizer=optimizer), made(estimator_optimizer=optimizer)
    net.loss_scale = factor
    for _ in range(2):
        torch.autograd.backward(8 * nn.functional.cross_entropy(net(inputs), Y) * factor)
    for name, value in twin.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert all(each.grad is None for each in net.interface_parameters())
    net.loss_scale = 1.0
    backward(net)
    backward(twin)
    for name, value in twin.state_dict().items():
        far = 0.0 if waits or optimizer is sgd else 0.05  # where nothing waits, Adam's number of steps goes on
        torch.testing.assert_close(net.state_dict()[name], value, rtol=far, atol=far, msg=name)


def test_a_copy_of_such_a_net_applies_its_own_fits() -> None:
    net = made(estimator_optimizer=sgd)
    other = copy.deepcopy(net)
    before = [each.clone() for each in net.interface_parameters()]
    backward(other)
    assert all(torch.equal(one, two) for one, two in zip(before, net.interface_parameters(), strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(before, other.interface_parameters(), strict=True))


def test_a_trainer_takes_the_optimizer_of_the_estimators() -> None:
    net = made(estimator_optimizer=lambda parameters: torch.optim.RMSprop(parameters), loss=nn.functional.cross_entropy)
    trainer = net.trainer(sgd)
    assert {type(each) for each in trainer.estimator_optimizers.values()} == {torch.optim.RMSprop}
    assert {type(each) for each in trainer.optimizers.values()} == {torch.optim.SGD}
    assert isinstance(net.estimator_optimizer, torch.optim.RMSprop)


@pytest.mark.parametrize(
    ("gradient", "make", "text"),
    [("synthetic", lambda parameters: None, "gave NoneType"), ("zero", sgd, "no estimator of this net learns")],
)
def test_what_is_no_optimizer_of_estimators_is_refused(gradient: str, make: Any, text: str) -> None:
    model: Callable[[Tensor], Tensor] = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with pytest.raises(OptimizerError, match=text):
        dnifx.decouple(model, ["0"], args=(X,), gradient=gradient, estimator_optimizer=make)  # type: ignore[arg-type]
