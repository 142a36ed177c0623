"""Containers that cross a cut whole: taken apart where they are made, made again where they are read."""

import copy
import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import InputError, LegalizeError
from dnifx.passes import compiler
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.graph import captured
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted.ops import guard_length
from tests.real_models.model_checks import spread_loss
from tests.wild.checks import check_call


def inputs(batch: int) -> Tensor:
    return torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


class Makes(nn.Module):
    """Gives two tensors in a container, one of them nested, and is looked at by Python, so that a tracer keeps it whole."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        left, right = self.one(x).tanh(), self.two(x) if float(x.detach().abs().sum()) >= 0 else x
        made: dict[str, Any] = {
            "tuple": (left, (right, 2)),
            "list": [left, [right, 2]],
            "dict": {"left": left, "more": (right, 2)},
            "growing": [left, (right, 2), *(left for _ in range(len(x) - 3))],
            "set": {"left": left, 7: right},
        }
        return made[self.kind]


class Takes(nn.Module):
    """Reads such a container, and is kept whole too."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 2)

    def forward(self, held: Any) -> Tensor:
        if float(torch.ones(())) < 0:
            return held  # type: ignore[no-any-return]
        left, right, *more = held.values() if isinstance(held, dict) else held
        right, number = (right, 1) if isinstance(right, Tensor) else right
        result: Tensor = self.last(left * right * number + len(more))
        return result


class Passes(nn.Module):
    """What one module makes is given whole to others."""

    def __init__(self, kind: str, readers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.makes, self.takes = Makes(kind), nn.ModuleList([Takes() for _ in range(readers)])

    def forward(self, x: Tensor) -> Tensor:
        held = self.makes(x)
        return torch.stack([takes(held) for takes in self.takes]).sum(0)


class Stacks(nn.Module):
    """Cuts a value into pieces and joins them."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.first, self.last = dim, nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.cat(self.first(x).split(2, self.dim), self.dim))
        return result


class Loops(Stacks):
    """The same in a loop, whose length a recorded graph guards."""

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.first(x).split(2, self.dim)
        result: Tensor = self.last(torch.cat([piece.tanh() for piece in pieces], self.dim))
        return result


def decoupled(model: nn.Module, cuts: list[str], gradient: str = "oracle") -> DecoupledModule:
    return dnifx.decouple(model.double(), cuts, args=(inputs(3),), gradient=gradient, loss=spread_loss)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture by torch.fx alone, which hands containers on whole."""
    monkeypatch.setattr(compiler, "CaptureGraph", functools.partial(CaptureGraph, methods=("symbolic",)))


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
@pytest.mark.usefixtures("traced")
def test_a_container_that_modules_pass_on_crosses_as_its_parts(kind: str) -> None:
    model = Passes(kind)
    net = decoupled(model, ["makes"])
    assert [len(boundary.values) for boundary in net.boundaries] == [2]
    check_call(copy.deepcopy(model), net, ((inputs(3),), {}))


@pytest.mark.usefixtures("traced")
def test_a_tuple_goes_to_several_readers() -> None:
    model = Passes("tuple", readers=2).double()
    check_call(copy.deepcopy(model), decoupled(model, ["makes"]), ((inputs(3),), {}))


@pytest.mark.usefixtures("traced")
def test_without_an_estimate_nothing_flows_through_a_container() -> None:
    net = decoupled(Passes("dict"), ["makes"], "zero")
    torch.autograd.backward(spread_loss(net(inputs(3)), None))
    assert all(not parameter.grad.any() for parameter in net.original.makes.parameters() if parameter.grad is not None)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(("model", "cut"), [(Stacks(0), "split"), (Passes("growing"), "makes")])
@pytest.mark.usefixtures("traced")
def test_another_number_of_parts_is_never_taken_for_the_same(model: nn.Module, cut: str) -> None:
    net = decoupled(model, [cut])
    check_call(copy.deepcopy(model), net, ((inputs(3),), {}))
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(InputError, match="other values cross its cuts"):
        net(inputs(6))
    with pytest.raises(InputError, match="other values cross its cuts"):
        trainer.step(inputs(6), target=None)


def test_a_loop_over_pieces_can_be_cut_before_it() -> None:
    model = Loops(0)
    net = decoupled(model, ["split"])
    assert [len(boundary.values) for boundary in net.boundaries] == [2]
    assert sum(node.target is guard_length for node in captured(net.program).nodes) == 1
    check_call(copy.deepcopy(model), net, ((inputs(3),), {}))
    check_call(copy.deepcopy(model), net, ((inputs(4),), {}))
    with pytest.raises(InputError, match="other values cross its cuts"):
        net(inputs(6))


@pytest.mark.usefixtures("traced")
def test_the_folder_takes_a_container_apart_as_the_module_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    net = decoupled(Stacks(), ["split"], "synthetic")
    net.to_folder(tmp_path / "emitted_pieces")
    package = importlib.import_module("emitted_pieces")
    emitted = package.Net()
    for each in (emitted, net):
        torch.autograd.backward(spread_loss(each(inputs(3)), None))
    wanted = {name: parameter.grad for name, parameter in net.named_parameters()}
    found = {name: parameter.grad for name, parameter in emitted.named_parameters()}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for name in [name for name in sys.modules if name.startswith("emitted_pieces")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("kind", "readers", "text"), [("set", 1, "a dict of tensors"), ("list", 2, "may change what it holds")]
)
@pytest.mark.usefixtures("traced")
def test_what_cannot_be_made_again_is_refused(kind: str, readers: int, text: str) -> None:
    with pytest.raises(LegalizeError, match=text):
        decoupled(Passes(kind, readers), ["makes"])


def test_fewer_pieces_than_were_captured_are_another_input_kind() -> None:
    model = Loops(0)
    net = dnifx.decouple(model.double(), ["first"], args=(inputs(6),), gradient="oracle", loss=spread_loss)
    check_call(copy.deepcopy(model), net, ((inputs(2),), {}))
