"""Derivatives of derivatives: refused at an interface by its name, true under ``backprop``, and those that forward takes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import dnifx
from dnifx.errors import DerivativeError, DnifxError, LegalizeError
from dnifx.estimators import BPLambda, LocalLoss, Synthetic, SyntheticInput
from tests.passes.programs import mlp

X = torch.randn(4, 6)


def penalty(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient penalty of WGAN-GP."""
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


ESTIMATORS: Mapping[str, dict[str, Any]] = {
    "synthetic": {},
    "zero": {"gradient": "zero"},
    "affine": {"gradient": Synthetic(hidden=0)},
    "mixed": {"gradient": BPLambda(0.5)},
    "local loss": {"gradient": LocalLoss(), "context": "label", "num_classes": 3},
    "synthetic inputs": {"inputs": SyntheticInput()},
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("cut", ["0", "2"])
def test_a_second_derivative_is_refused_and_the_boundary_named(name: str, cut: str) -> None:
    options = ESTIMATORS[name]
    net = dnifx.decouple(mlp(6, 6, 6, 3), cut, args=(X,), **options)
    context = {"context": torch.tensor([0, 1, 2, 0])} if "context" in options else {}
    with pytest.raises(DerivativeError, match=rf"boundary '{cut}'.*net\.backprop\(\)"):
        penalty(lambda x: net(x, **context), X.clone().requires_grad_()).backward()  # type: ignore[no-untyped-call]


def test_the_boundary_that_is_met_first_is_named() -> None:
    net = dnifx.decouple(mlp(6, 6, 6, 3), ["0", "2"], args=(X,))
    with pytest.raises(DerivativeError, match="boundary '0'"):
        penalty(net, X.clone().requires_grad_()).backward()  # type: ignore[no-untyped-call]


def test_states_and_errors_refuse_too() -> None:
    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRUCell(6, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.cell(x, h)
            return self.out(h), h

    h = torch.randn(4, 4)
    recurrent = dnifx.decouple(Core(), dnifx.Recurrent("h", "1"), args=(X, h))
    with pytest.raises(DerivativeError, match="boundary 'h'"):
        penalty(lambda x: recurrent(x, h)[0], X.clone().requires_grad_()).backward()  # type: ignore[no-untyped-call]
    feedback = dnifx.decouple(mlp(6, 6, 3), "0", args=(X,), gradient="direct_feedback")
    with pytest.raises(DerivativeError, match="boundary '0'"):
        penalty(feedback, X.clone().requires_grad_()).backward()  # type: ignore[no-untyped-call]


def test_a_graph_of_the_gradient_that_nobody_differentiates_is_no_error() -> None:
    net = dnifx.decouple(mlp(6, 6, 3), "0", args=(X,))
    made = torch.autograd.grad(net(X).sum(), list(net.parameters()), create_graph=True)
    again = torch.autograd.grad(net(X).sum(), list(net.parameters()))
    assert all(map(torch.equal, made, again))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_under_backprop_the_second_derivative_is_that_of_the_model(name: str) -> None:
    model = mlp(6, 6, 6, 3)
    net = dnifx.decouple(model, ["0", "2"], args=(X,), **ESTIMATORS[name])
    with net.backprop():
        made = gradients(penalty(net, X.clone().requires_grad_()), model)
    wanted = gradients(penalty(model, X.clone().requires_grad_()), model)
    for one, other in zip(made, wanted, strict=True):
        assert one is other is None or (one is not None and other is not None and torch.equal(one, other))


def test_backprop_ends_with_its_block_and_may_be_nested() -> None:
    net = dnifx.decouple(mlp(6, 6, 3), "0", args=(X,), gradient="zero")
    first = net.get_parameter("0.weight")

    def reaches() -> bool:
        (gradient,) = torch.autograd.grad(net(X).sum(), first)
        return bool(gradient.any())

    assert not reaches()
    with net.backprop():
        assert reaches()
        with pytest.raises(ZeroDivisionError), net.backprop():
            raise ZeroDivisionError
        assert reaches()
    assert not reaches()


class Forces(nn.Module):
    """An energy, and its derivative with respect to places that an encoder gives."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 1)
        self.head, self.whole = nn.Linear(6, 2), whole

    def forward(self, x: Tensor) -> Tensor:
        place = self.encoder(x)
        energy = self.second(torch.tanh(self.first(place)))
        if self.whole:
            (force,) = torch.autograd.grad(outputs=energy.sum(), inputs=place, create_graph=True)
        else:
            force = torch.autograd.grad([energy.sum()], [place], create_graph=True)[0]
        result: Tensor = self.head(force)
        return result


@pytest.mark.parametrize("cut", ["first", "second", "tanh", ["encoder", "first"]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_cut_inside_of_what_forward_differentiates_is_refused(cut: Any, whole: bool) -> None:
    with pytest.raises(LegalizeError, match=r"torch\.autograd\.grad.*(first|second|tanh).*leave out the cut"):
        dnifx.decouple(Forces(whole), cut, args=(X,))


@pytest.mark.parametrize("cut", ["encoder", dnifx.Edge("getitem", "head")])
def test_a_cut_beside_it_trains_as_the_model(cut: Any) -> None:
    model = Forces()
    other = copy.deepcopy(model)
    try:
        net = dnifx.decouple(model, cut, args=(X,), gradient="oracle", loss=lambda out, target: out.square().mean())
    except DnifxError as error:
        pytest.fail(str(error))
    trainer = net.trainer(lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        trainer.step(X, target=None)
        optimizer.zero_grad()
        other(X).square().mean().backward()
        optimizer.step()
    for one, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, wanted)


class Branching(nn.Sequential):
    """A model that reads a size, so that its graph has a guard."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x if x.size(0) > 99 else x)  # type: ignore[no-any-return]


def forward_mode(net: Any) -> None:
    with forward_ad.dual_level():
        net(forward_ad.make_dual(X, torch.ones_like(X)))


TRANSFORMS: list[Callable[[Any], object]] = [
    lambda net: torch.vmap(lambda x: net(x[None]))(X),
    lambda net: torch.func.grad(lambda x: net(x).sum())(X),
    lambda net: torch.func.jacrev(lambda x: net(x).sum(0))(X),
    lambda net: torch.func.jvp(net, (X,), (X,)),
    lambda net: torch.func.grad(lambda own: torch.func.functional_call(net, own, (X,)).sum())(
        dict(net.named_parameters())
    ),
    forward_mode,
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # in torch's own forward mode
@pytest.mark.parametrize("guarded", [False, True])
def test_a_transform_of_functions_is_refused_and_the_remedy_works(
    transform: Callable[[Any], object], guarded: bool
) -> None:
    model = Branching(*mlp(6, 6, 3)) if guarded else mlp(6, 6, 3)
    net = dnifx.decouple(model, "0", args=(X,))
    with pytest.raises(DerivativeError, match=r"Call the net under `with net\.backprop"):
        transform(net)
    with net.backprop():
        transform(net)
    net(X).sum().backward()
