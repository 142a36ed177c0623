"""Calls in a forward that matter by what they do: each is made in each call of the net, or refused; none is dropped."""

import copy
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import CaptureError
from dnifx.ir import Program
from dnifx.passes.capture.capture import CaptureGraph

DONE: list[str] = []
LOGGER = logging.getLogger("tests.effects")


class Noting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        DONE.append(record.getMessage())


@torch.library.custom_op("effects::tell", mutates_args=())
def note(x: Tensor) -> None:
    DONE.append(f"{float(x.sum()):.4f}")


@torch.library.custom_op("effects::tell_and_copy", mutates_args=())
def note_and_copy(x: Tensor) -> Tensor:
    DONE.append(f"{float(x.sum()):.4f}")
    return x.clone()


@torch.library.custom_op("effects::add_up", mutates_args=("total",))
def add_up(total: Tensor, x: Tensor) -> None:
    total.add_(x.sum())


class Acting(nn.Module):
    """Does something between its layers."""

    def __init__(self, effect: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.effect = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), effect
        self.total: Tensor
        self.register_buffer("total", torch.zeros(()))
        self.plain, self.weight, self.seen = torch.zeros(()), nn.Parameter(torch.ones(4)), [0.0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.effect(self, h)
        return self.c(torch.tanh(self.b(torch.tanh(h) * self.weight)))  # type: ignore[no-any-return]


def decays(model: Acting, h: Tensor) -> Tensor:
    with torch.no_grad():
        return model.weight.mul_(0.9)


CALLED: dict[str, Callable[[Any, Tensor], Any]] = {
    "operator": lambda model, h: note(h),
    "operator by its packet": lambda model, h: torch.ops.effects.tell(h),
    "operator whose value is unused": lambda model, h: note_and_copy(h),
    "operator that writes": lambda model, h: add_up(model.total, h.detach()),
    "print": lambda model, h: print("sizes", h.shape, len(h), h.mean(), sep="; "),  # noqa: T201
    "logger": lambda model, h: LOGGER.info("mean %s of %d", h.mean(), h.shape[0]),
    "warning": lambda model, h: warnings.warn("take care", stacklevel=1),
    "buffer": lambda model, h: model.total.add_(h.detach().mean()),
    "attribute": lambda model, h: model.plain.mul_(0.5).add_(h.detach().mean()),
    "list": lambda model, h: model.seen.append(float(len(h))),
    "parameter": decays,
    "data of a parameter": lambda model, h: model.weight.data.clamp_(-0.5, 0.5),
    "assertion": lambda model, h: torch._assert_async((h.abs() < 1e4).all()),
}

REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "text of values": (lambda model, h: print(f"mean {h.mean():.3f}"), r"a text made of a tensor's values.*print"),  # noqa: T201
    "text of an item": (lambda model, h: print(f"mean {h.mean().item():.3f}"), r"a text made of a tensor's values"),  # noqa: T201
    "text to a logger": (lambda model, h: LOGGER.info(f"{h.mean()}"), r"a text made of a tensor's values.*logger"),
    "standard output": (lambda model, h: sys.stdout.write("here\n"), "what it prints and logs differs"),
    "hook": (lambda model, h: h.register_hook(lambda gradient: gradient * 0.5), r"register_hook\(\)"),
    "kept gradient": (lambda model, h: h.retain_grad(), r"retain_grad\(\)"),
    "hook on a parameter": (
        lambda model, h: model.weight.register_post_accumulate_grad_hook(lambda each: DONE.append("hook")),
        r"register_post_accumulate_grad_hook\(\)",
    ),
    "hook on a module": (
        lambda model, h: model.b.register_forward_hook(lambda *each: 2 * each[2]),
        "installs hooks on b",
    ),
    "backward": (lambda model, h: model.weight.sum().backward(), r"backward\(\)"),
    "function backward": (lambda model, h: torch.autograd.backward(model.weight.sum()), r"backward\(\)"),
}


def decoupled(model: nn.Module, cut: str = "b") -> dnifx.DecoupledModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dnifx.decouple(model, cut, args=(torch.randn(3, 4),), gradient="oracle")


def one_call(model: nn.Module, x: Tensor) -> Any:
    """Run forward and backward; return all that can be seen of it."""
    DONE.clear()
    printed = StringIO()
    with redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
    return output.detach(), printed.getvalue(), list(DONE), [str(each.message) for each in warned]


def held(model: Acting) -> Any:
    return model.total.item(), model.plain.item(), model.weight.tolist(), model.seen


@pytest.fixture(autouse=True)
def _logged() -> Any:
    handler, propagates = Noting(), LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    yield
    LOGGER.removeHandler(handler)
    LOGGER.propagate = propagates


@pytest.mark.parametrize("name", CALLED)
def test_what_acts_is_called_in_each_call(name: str) -> None:
    torch.manual_seed(0)
    model = Acting(CALLED[name])
    plain, before = copy.deepcopy(model), held(model)
    net = decoupled(model)
    assert held(model) == before
    for batch in (3, 5, 3):
        x = torch.randn(batch, 4)
        expected, found = one_call(plain, x), one_call(net, x)
        assert torch.equal(expected[0], found[0])
        assert expected[1:] == found[1:]
        assert held(plain) == held(model)
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.allclose(one.grad, other.grad)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_repeats_is_refused(name: str) -> None:
    effect, reason = REFUSED[name]
    model = Acting(effect)
    before = held(model)
    with pytest.raises(CaptureError, match=reason) as caught:
        decoupled(model)
    assert len(str(caught.value)) < 600
    assert held(model) == before
    assert not model.b._forward_hooks


class Inside(nn.Module):
    """The model as a part of another, so that it may be kept whole."""

    def __init__(self, effect: Any) -> None:
        super().__init__()
        self.first, self.inner, self.b, self.c = nn.Linear(4, 4), Acting(effect), nn.Linear(2, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.inner(self.first(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["text of values", "text to a logger", "hook"])
def test_a_module_that_acts_is_kept_whole(name: str) -> None:
    torch.manual_seed(0)
    model = Inside(REFUSED[name][0])
    plain, net = copy.deepcopy(model), decoupled(model)
    assert net.program.capture is not None
    assert [each.path for each in net.program.capture.kept] == ["inner"]
    for _ in range(2):
        x = torch.randn(3, 4)
        expected, found = one_call(plain, x), one_call(net, x)
        assert torch.equal(expected[0], found[0])
        assert expected[1:] == found[1:]


@pytest.mark.parametrize("method", ["export", "symbolic"])
def test_no_method_leaves_a_trace_of_what_forward_writes(method: str) -> None:
    model = Acting(lambda model, h: (decays(model, h), model.plain.add_(1)))
    before = held(model)
    with suppress(CaptureError):
        CaptureGraph(methods=(method,)).run(Program(model, (torch.randn(3, 4),)))
    assert held(model) == before
