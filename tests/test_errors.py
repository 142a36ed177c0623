"""The mistakes that users make: each a DnifxError that says what, where and what to do."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx import errors
from dnifx.errors import DnifxError, nearest
from dnifx.runtime.decoupled import DecoupledModule
from tests.passes.programs import Residual, mlp

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 0, 1])


class ByValue(nn.Module):
    """A model whose forward needs the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        for _ in range(int(h.detach().abs().max() * 1000)):
            h = h + 1
        return h


def decouple(model: nn.Module, cuts: Any, **options: Any) -> DecoupledModule:
    return dnifx.decouple(model, cuts, args=(X,), **options)


def step(loss: Any, target: Any) -> object:
    net = decouple(mlp(6, 6, 2), "1", loss=loss)
    return net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(X, target=target)


MISTAKES: dict[str, tuple[Callable[[], object], type[DnifxError], tuple[str, ...]]] = {
    "no such cut": (
        lambda: decouple(Residual(), "block.0"),
        errors.CutError,
        ("no cut 'block.0'", "'blocks.0'"),
    ),
    "a cut set that is not convex": (
        lambda: decouple(Residual(), dnifx.Edge("blocks.0", "blocks.1")),
        errors.CutError,
        ("does not separate the model", "==X==>", "round:", "also cut dnifx.Edge"),
    ),
    "a target of the wrong shape": (
        lambda: step(F.cross_entropy, Y[:3]),
        errors.LossError,
        ("the loss cannot be computed", "output: tensor (4, 2)", "target: tensor (3,)", "give target= in the form"),
    ),
    "a target that would be broadcast": (
        lambda: step(F.mse_loss, torch.zeros(4, 1)),
        errors.LossError,
        ("the loss cannot be computed", "target: tensor (4, 1)"),
    ),
    "no loss": (
        lambda: decouple(mlp(6, 6, 2), "1").trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
        errors.LossError,
        ("a trainer needs a loss", "dnifx.decouple(..., loss=...)"),
    ),
    "a loss that is not finite": (
        lambda: step(F.mse_loss, torch.full((4, 2), torch.nan)),
        errors.LossError,
        ("the loss of step 0 is nan", "nothing that depends on it was updated", "lower the learning rate"),
    ),
    "an estimator that is not there": (
        lambda: decouple(mlp(6, 6, 2), "1", gradient="syntheti"),
        errors.EstimatorError,
        ("gradient='syntheti' is not an estimator", "'synthetic'"),
    ),
    "no context": (
        lambda: decouple(mlp(6, 6, 2), "1", context="label", num_classes=2)(X),
        errors.ContextError,
        ("label (2 classes)", "net(x, context=...)", "torch.no_grad()"),
    ),
    "optimizers that leave a partition out": (
        lambda: decouple(mlp(6, 6, 2), "1", loss=F.cross_entropy).trainer({"submod_0": torch.optim.SGD}),
        errors.OptimizerError,
        ("optimizer=", "missing 'submod_1'", "the groups are"),
    ),
    "no model": (lambda: dnifx.decouple(torch.relu, "1"), errors.CaptureError, ("takes an nn.Module",)),  # type: ignore[arg-type]
    "an example that does not fit": (
        lambda: dnifx.decouple(mlp(6, 6, 2), "1", args=(torch.randn(4, 5),)),
        errors.CaptureError,
        ("Sequential", "mat1 and mat2 shapes cannot be multiplied"),
    ),
    "an example that is missing": (lambda: dnifx.decouple(mlp(6, 6, 2), "1"), errors.InputError, ("Sequential",)),
    "a schedule that is not there": (
        lambda: decouple(mlp(6, 6, 2), "1", loss=F.cross_entropy).trainer(torch.optim.SGD, schedule="random"),
        errors.ScheduleError,
        ("There is no schedule 'random'", "'random_order'"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_says_what_where_and_what_to_do(mistake: str) -> None:
    make, kind, parts = MISTAKES[mistake]
    with pytest.raises(DnifxError) as caught:
        make()
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)


def test_no_error_is_raised_where_no_mistake_is_made() -> None:
    net = decouple(Residual(), "blocks.0", loss=F.cross_entropy)
    net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(X, target=Y)
    assert torch.equal(net(X), net.original(X))


def by_value() -> str | list[Tensor]:
    """Return the outputs of a decoupled model that needs values, or the text of its refusal."""
    inputs = (X, 2 * X, X / 3)
    torch.manual_seed(0)
    model = ByValue()
    try:
        net = decouple(model, "linear")
    except DnifxError as error:
        return str(error)
    return [net(x) - model(x) for x in inputs]


def test_a_model_that_needs_a_value_is_refused_by_name_or_follows_its_values() -> None:
    found = by_value()
    if isinstance(found, str):
        assert "ByValue cannot be captured" in found
        assert "for _ in range(int(h.detach().abs().max()" in found, "the line of the model's source"
    else:
        assert not any(difference.any() for difference in found)


def test_every_error_is_a_dnifx_error_with_a_docstring() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception) and not issubclass(kind, Warning)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, DnifxError)
        assert kind.__doc__
        assert kind.__bases__ in ((Exception,), (DnifxError,)), "one level of children"


@pytest.mark.parametrize(
    ("name", "names", "text"),
    [
        ("layr1", ["layer1", "layer2", "head"], "'layer1', 'layer2'"),
        ("zzz", ["layer1", "head"], "'layer1', 'head'"),
        ("", ["a", "b", "a"], "'a', 'b'"),
        ("x", [], "none"),
    ],
)
def test_the_nearest_names(name: str, names: list[str], text: str) -> None:
    assert nearest(name, names) == text


def test_only_so_many_names_are_listed() -> None:
    assert nearest("", map(str, range(100)), 3).count(",") == 2
