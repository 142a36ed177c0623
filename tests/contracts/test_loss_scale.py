"""Contract 14: what a loop multiplies the loss by, and how many micro-batches it takes, changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx import estimators
from dnifx.runtime.decoupled import DecoupledModule
from dnifx.runtime.emitted import fitting, interface, loss_scale
from tests.contracts.cases import Bent, Case, cases, decoupled
from tests.contracts.checks import close
from tests.contracts.test_contracts import BATCH_DEPENDENT

Gradients = dict[str, Tensor | None]
Spelled = Callable[[float], Any]

SPELLINGS: dict[str, Spelled] = {
    "number": lambda factor: factor,
    "tensor": lambda factor: torch.tensor(factor),
    "callable": lambda factor: lambda: factor,
    "callable tensor": lambda factor: lambda: torch.tensor([factor]),
    "scaler": lambda factor: torch.amp.GradScaler("cpu", init_scale=factor),
}
FACTORS = (1.0, 2.0**16, 0.25, 3.0)


def left(net: DecoupledModule, factor: float = 1.0) -> Gradients:
    """Return what is left in ``.grad`` of model and estimators, divided by a factor."""
    found = {name: each.grad for name, each in net.named_parameters() if each.requires_grad}
    return {name: None if each is None else each / factor for name, each in found.items()}


def backward(case: Case, net: DecoupledModule, factor: float, parts: int = 1) -> Gradients:
    """Accumulate the gradients of micro-batches, whose losses are multiplied by a factor and divided by their number."""
    net.zero_grad(set_to_none=True)
    pieces = [tensor.chunk(parts) for tensor in (*case.inputs, case.target)]
    for *inputs, target in zip(*pieces, strict=True):
        torch.manual_seed(0)
        torch.autograd.backward(case.loss(net(*inputs), target) * (factor / parts))
    return left(net, factor)


def check_scaled(case: Case, factor: float, spelled: Spelled) -> None:
    """A scaled loss leaves gradients that are as many times as large, on model and estimators."""
    net = decoupled(case, Bent)
    wanted = backward(case, net, 1.0)
    net = decoupled(case, Bent)
    net.loss_scale = spelled(factor)
    close(backward(case, net, factor), wanted, rtol=1e-10, atol=1e-12)


def check_micro_batches(case: Case, factor: float) -> None:
    """Micro-batches of one example each leave what the whole batch does."""
    net = decoupled(case, Bent)
    wanted = backward(case, net, 1.0)
    net.loss_scale = factor / case.batch
    close(backward(case, net, factor, case.batch), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
@settings(max_examples=10)
@given(case=cases(training=True), factor=st.sampled_from(FACTORS))
def test_a_scaled_loss_changes_nothing(spelled: Spelled, case: Case, factor: float) -> None:
    check_scaled(case, factor, spelled)


@given(case=cases(training=True, without=BATCH_DEPENDENT), factor=st.sampled_from(FACTORS))
def test_micro_batches_add_up_to_the_batch(case: Case, factor: float) -> None:
    if case.mean:
        check_micro_batches(case, factor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("spelled", ["number", "tensor", "callable"])
def test_a_scaled_loss_changes_nothing_in_a_compiled_net(spelled: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    net = dnifx.decouple(model, ["0"], args=(x,), gradient=estimators.Synthetic(hidden=1))
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter)
    net(x).square().mean().backward()
    wanted = left(net)
    net.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    net.loss_scale = SPELLINGS[spelled](8.0)
    compiled = torch.compile(net, backend="eager")
    (compiled(x).square().mean() * 8.0).backward()
    close(left(net, 8.0), wanted, rtol=1e-5, atol=1e-7)


class Labelled(nn.Module):
    """A model that computes its own loss; ``returned`` says what stands beside it."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.returned = returned

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        logits = self.last(torch.tanh(self.second(hidden)))
        loss = nn.functional.cross_entropy(logits, labels)
        if self.returned == "loss":
            return loss
        if self.returned == "tuple":
            return logits, loss
        if self.returned == "penalty":
            return {"logits": logits, "penalty": hidden.square().mean()}
        return {"loss": loss, "logits": logits, "hidden": hidden, "error": (logits - 1).square().mean() + loss}


X, LABELS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


def labelled(returned: str, gradient: Any = Bent) -> DecoupledModule:
    torch.manual_seed(0)
    return dnifx.decouple(
        Labelled(returned).double(), ["first", "second"], args=(X, LABELS), gradient=gradient, kwargs={}
    )


def loss_of(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output["loss"] if isinstance(output, dict) else output[1]
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("returned", ["loss", "tuple"])
@pytest.mark.parametrize("factor", [2.0**16, 0.25])
def test_a_loss_of_the_model_says_its_factor_itself(returned: str, factor: float) -> None:
    one, other = labelled(returned), labelled(returned)
    torch.autograd.backward(loss_of(one(X, LABELS)))
    torch.autograd.backward(loss_of(other(X, LABELS)) * factor)
    close(left(other, factor), left(one), rtol=1e-10)


def test_two_calls_may_have_factors_of_their_own() -> None:
    one, two, both = labelled("loss"), labelled("loss"), labelled("loss")
    torch.autograd.backward(loss_of(one(X, LABELS)))
    torch.autograd.backward(loss_of(two(-X, LABELS)))
    torch.autograd.backward(loss_of(both(X, LABELS)) + 0.1 * loss_of(both(-X, LABELS)))
    first, second = left(one), left(two)
    wanted = {name: each + 0.1 * second[name] for name, each in first.items() if each is not None}  # type: ignore[operator]
    close(left(both), wanted, rtol=1e-10, atol=1e-12)


def test_a_loss_against_which_a_model_climbs_still_fits_its_estimators() -> None:
    one, other = labelled("loss"), labelled("loss")
    torch.autograd.backward(loss_of(one(X, LABELS)))
    torch.autograd.backward(-loss_of(other(X, LABELS)))
    fits = {id(each) for each in other.interface_parameters()}
    sign = {name: 1 if id(each) in fits else -1 for name, each in other.named_parameters()}
    close({name: each if each is None else each * sign[name] for name, each in left(other).items()}, left(one), 1e-10)


def test_a_penalty_beside_the_output_is_no_loss() -> None:
    one, other = labelled("penalty"), labelled("penalty")
    for net, factor in ((one, 1.0), (other, 8.0)):
        net.loss_scale = factor
        output = net(X, LABELS)
        loss = nn.functional.cross_entropy(output["logits"], LABELS) + 0.01 * output["penalty"]
        torch.autograd.backward(loss * factor)
    close(left(other, 8.0), left(one), rtol=1e-10, atol=1e-12)


def test_a_loss_that_nobody_differentiates_leaves_the_net_with_what_it_was_told() -> None:
    one, other = labelled("tuple"), labelled("tuple")
    for net, factor in ((one, 1.0), (other, 8.0)):
        net.loss_scale = factor
        torch.autograd.backward(net(X, LABELS)[0].square().mean() * factor)
    close(left(other, 8.0), left(one), rtol=1e-10, atol=1e-12)


LABEL: dict[str, Any] = {"context": "label", "num_classes": 3, "loss": nn.functional.cross_entropy}
CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "synthetic": ("synthetic", {}),
    "sigmoid_linear": ("sigmoid_linear", {}),
    "prop": (estimators.Prop(0.1), {}),
    "bplambda": ("bplambda", {}),
    "local_loss": ("local_loss", LABEL),
    "bplambda of local_loss": (estimators.BPLambda(0.5, estimators.LocalLoss()), LABEL),
    "suffix": (estimators.Suffix(), {"loss": nn.functional.cross_entropy}),
    "critic": ("critic", LABEL),
    "sobolev": ("sobolev", LABEL),
    "direct_feedback": ("direct_feedback", {}),
    "synthetic inputs": ("synthetic", {"inputs": "synthetic"}),
}


def chain(gradient: Any, **options: Any) -> DecoupledModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    net = dnifx.decouple(model, ["1", "3"], args=(X,), gradient=gradient, **options).double()
    torch.manual_seed(1)
    for parameter in net.interface_parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("factor", [2.0**16, 0.25])
def test_whatever_the_estimator_learns_from(choice: str, factor: float) -> None:
    gradient, options = CHOICES[choice]
    one, other = chain(gradient, **options), chain(gradient, **options)
    other.loss_scale = factor
    given = {"context": LABELS} if "context" in options else {}
    given |= {"target": LABELS} if choice in ("critic", "sobolev", "suffix") else {}
    for net, times in ((one, 1.0), (other, factor)):
        torch.autograd.backward(nn.functional.cross_entropy(net(X, **given), LABELS) * times)
    close(left(other, factor), left(one), rtol=1e-9, atol=1e-12)
    close(dict(other.named_buffers()), dict(one.named_buffers()))


def test_an_average_moves_by_the_true_gradient() -> None:
    one, other = chain("stale"), chain("stale")
    other.loss_scale = 2.0**16
    for net, times in ((one, 1.0), (other, 2.0**16)):
        torch.autograd.backward(nn.functional.cross_entropy(net(X), LABELS) * times)
    averages = {name: value for name, value in one.named_buffers() if "average" in name}
    assert any(value.any() for value in averages.values())
    close(dict(other.named_buffers()), averages, rtol=1e-9)


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), "16", None, torch.ones(2), True])
def test_what_cannot_be_a_factor_is_refused(wrong: Any) -> None:
    with pytest.raises(dnifx.errors.LossError, match="loss_scale"):
        chain("synthetic").loss_scale = wrong


def ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interface, "factor_of", lambda scale, told, like: 1.0)


def fits_in_true_units(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interface, "arriving_fit", lambda *given: fitting.arriving_fit(*given) / given[4])


def estimates_unscaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interface, "scaled", lambda estimate, weight, scale: estimate * weight)


def read_at_the_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loss_scale.LossScale, "now", lambda self, device: 1.0)


FAULTS = [ignored, fits_in_true_units, estimates_unscaled, read_at_the_start]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_build_is_noticed(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_whatever_the_estimator_learns_from("synthetic", 0.25)


class Carrying(nn.Module):
    """A recurrent model; with labels it returns its loss."""

    def __init__(self, labelled: bool) -> None:
        super().__init__()
        self.cell, self.readout, self.labelled = nn.GRUCell(4, 5), nn.Linear(5, 3), labelled

    def forward(self, x: Tensor, state: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        logits = self.readout(state)
        return (nn.functional.cross_entropy(logits, labels) if self.labelled else logits), state


@pytest.mark.parametrize("labelled", [True, False], ids=["the model's loss", "a loss of the loop's"])
@pytest.mark.parametrize("factor", [2.0**16, 0.25])
def test_windows(labelled: bool, factor: float) -> None:
    found = []
    for times in (1.0, factor):
        torch.manual_seed(0)
        start = torch.zeros(6, 5, dtype=torch.float64)
        model = Carrying(labelled).double()
        net = dnifx.decouple(model, dnifx.Recurrent("state", "1", scale=1.0), args=(X, start, LABELS))
        for parameter in net.interface_parameters():
            nn.init.normal_(parameter, std=0.3)
        net.loss_scale = 1.0 if labelled else times
        output, state = net(X, start, LABELS)
        for _ in range(2):
            loss = output if labelled else nn.functional.cross_entropy(output, LABELS)
            torch.autograd.backward(loss * times)
            output, state = net(-X, state, LABELS)
        assert all(each.grad is not None for each in net.interface_parameters())
        found.append(left(net, times))
    close(found[1], found[0], rtol=1e-9, atol=1e-12)
