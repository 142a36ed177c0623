"""A net under ``torch.compile`` answers each kind of call as the net itself does, the kinds that it was not captured for too."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.zoo.language_model import LanguageModel


class Layers(nn.Module):
    """Three layers; what happens between the first two is the subclass's."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def end(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.c(self.b(hidden).tanh())
        return output

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.a(x).tanh() * self.scale)


class Flagged(Layers):
    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        hidden = self.a(x).tanh()
        return self.end(hidden * 2 if double else hidden)


class ReadsValues(Layers):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        return self.end(hidden * 2 if float(x.sum()) > 0 else hidden)


class ReadsSizes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        return self.end(hidden * 2 if len(x) > 5 else hidden)


class DropsOut(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(functional.dropout(self.a(x).tanh(), 0.5, self.training))


class Counts(Layers):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.end(self.a(x).tanh() * self.calls)


def language_model() -> nn.Module:
    return LanguageModel(7, layers=2, width=8, heads=2, length=12)


def batch(examples: int = 4, sign: int = 1) -> Tensor:
    return sign * torch.rand(examples, 4, generator=torch.Generator().manual_seed(examples))


def tokens(length: int) -> Tensor:
    return torch.arange(2 * length).view(2, length) % 7


def scaled(by: float) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        net.original.scale = by

    return change


def evaluating(net: nn.Module) -> None:
    net.eval()


def training(net: nn.Module) -> None:
    net.train()


def lowered(net: Any) -> None:
    """Let the calls that follow run under autocast, or no longer."""
    net.__dict__["lowered"] = not net.__dict__.get("lowered", False)


X = batch()
CALLS: dict[str, tuple[Callable[[], nn.Module], Tensor, Sequence[Any]]] = {
    "an argument": (Flagged, X, [(X,), (X, True), (X,), (X, True)]),
    "a value": (ReadsValues, X, [(X,), (batch(sign=-1),), (X,)]),
    "a size": (ReadsSizes, X, [(X,), (batch(9),), (batch(3),), (batch(9),), (batch(4),)]),
    "a mode": (DropsOut, X, [(X,), evaluating, (X,), training, (X,)]),
    "an attribute": (Layers, X, [(X,), scaled(2.0), (X,), scaled(3.0), (X,), scaled(1.0), (X,)]),
    "a count": (Counts, X, [(X,)] * 4),
    "a precision": (Layers, X, [(X,), lowered, (X,), (X,), lowered, (X,)]),
    "a length": (language_model, tokens(6), [(tokens(6),), (tokens(9),), (tokens(3),)]),
}


def answer(net: DecoupledModule, run: Callable[..., Tensor], given: Sequence[Any]) -> list[Tensor]:
    """Return the output of a call, and all gradients of a loss."""
    net.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, net.__dict__.get("lowered", False)):
        output = run(*given)
    torch.autograd.backward(output.square().mean())
    return [output.detach(), *(each.grad for each in net.parameters() if each.grad is not None)]


def made(model: Callable[[], nn.Module], x: Tensor) -> DecoupledModule:
    torch.manual_seed(0)
    net = dnifx.decouple(model(), 2, args=(x,), loss=functional.cross_entropy)
    torch.manual_seed(1)
    with torch.no_grad():
        for each in net.parameters():
            each.normal_()
    return net


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("changes", CALLS)
def test_what_changes_between_calls_changes_for_a_compiled_net(changes: str) -> None:
    torch._dynamo.reset()
    model, x, calls = CALLS[changes]
    plain, other = made(model, x), made(model, x)
    compiled = torch.compile(other, backend="eager")
    for call in calls:
        if callable(call):
            call(plain)
            call(other)
            continue
        wanted, found = answer(plain, plain, call), answer(other, compiled, call)
        assert len(wanted) == len(found) > 2
        for one, another in zip(wanted, found, strict=True):
            torch.testing.assert_close(another, one)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("changes", ["an argument", "a size", "a mode", "an attribute", "a length"])
def test_calls_of_the_captured_kind_are_one_graph(changes: str) -> None:
    torch._dynamo.reset()
    model, x, _ = CALLS[changes]
    plain, other = made(model, x), made(model, x)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for one, another in zip(answer(plain, plain, (x,)), answer(other, compiled, (x,)), strict=True):
        torch.testing.assert_close(another, one)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("changes", ["an argument", "a mode", "a precision"])
def test_a_new_kind_of_call_is_compiled_from_its_second_time(changes: str) -> None:
    torch._dynamo.reset()
    model, x, (first, *others) = CALLS[changes]
    net, layers = made(model, x), list[int]()

    def backend(module: Any, example: Any) -> Any:
        def counted(*given: Any) -> Any:
            layers.append(sum("linear" in str(node.target) for node in module.graph.nodes))
            return module(*given)

        return counted

    compiled = torch.compile(net, backend=backend)
    answer(net, compiled, first)
    assert sum(layers) >= 3
    for change in others[: 1 + callable(others[0])]:
        if callable(change):
            change(net)
            continue
        answer(net, compiled, change)
        layers.clear()
        answer(net, compiled, change)
        assert sum(layers) >= 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_calls_say_why_they_are_no_graph() -> None:
    torch._dynamo.reset()
    net = made(Flagged, X)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="this call differs from those that were captured"):
        compiled(X, True)
