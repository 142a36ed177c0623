"""Gradients of a loss of one's own: one backward pass gives the answers and the fit, and the fit is that of a pass of its own."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import dnifx
from dnifx.runtime.emitted.gradients import own_gradients


class Counted(torch.autograd.Function):
    """Counts the backward passes that go through it."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        Counted.passes += 1
        return arriving[0]


def heads(width: int) -> nn.ModuleDict:
    layers: dict[str, nn.Module] = {
        "used": nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 3)),
        "unused": nn.Linear(2, 2),
        "frozen": nn.Linear(width, 3).requires_grad_(False),
    }
    return nn.ModuleDict(layers).double()


def fitted(head: nn.ModuleDict, values: list[Tensor], label: Tensor, scale: float, once: bool, whole: bool) -> Any:
    """Return the answers, the gradients of the fit, and how many backward passes both took."""
    leaves = tuple(value.detach().requires_grad_() for value in values)
    Counted.passes = 0
    logits = sum(head["used"](Counted.apply(each)) + head["frozen"](each) for each in leaves)  # type: ignore[no-untyped-call]
    losses = functional.cross_entropy(logits, label, reduction="none")
    losses, factor = (losses.mean().reshape(1), len(label)) if whole else (losses, 1)
    answers = own_gradients(losses, leaves, factor, tuple(head.parameters()) if once else ())
    torch.autograd.backward(answers, [torch.full_like(each, scale) for each in answers])
    return answers, [each.grad for each in head.parameters()], Counted.passes


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 3), st.sampled_from([1.0, 0.5, 1024.0, 3.7]), st.booleans(), st.integers(0, 99)
)
def test_one_backward_pass_gives_what_two_give(batch: int, count: int, scale: float, whole: bool, seed: int) -> None:
    torch.manual_seed(seed)
    head = heads(4)
    values, label = [torch.randn(batch, 4).double() for _ in range(count)], torch.randint(3, (batch,))
    mine, own, passes = fitted(copy.deepcopy(head), values, label, scale, True, whole)
    theirs, other, twice = fitted(copy.deepcopy(head), values, label, scale, False, whole)
    assert (passes, twice) == (count, 2 * count)
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one, two)
    assert [each is None for each in own] == [each is None for each in other]
    for one, two in zip(own, other, strict=True):
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
            exact = scale in (1.0, 0.5, 1024.0) and (whole or batch in (1, 2, 4, 8))
            assert not exact or torch.equal(one, two)


def test_a_head_that_reads_no_value_answers_zero() -> None:
    head, value = heads(4), torch.randn(3, 4).double()
    leaf = value.requires_grad_()
    answers = own_gradients((leaf * 0).sum(1), (leaf,), 1, tuple(head["unused"].parameters()))
    torch.autograd.backward(answers, [torch.ones_like(each) for each in answers])
    assert not answers[0].any()


@pytest.mark.parametrize("gradient", ["suffix", "local_loss"])
@pytest.mark.parametrize("target", ["fused", "scheduled"])
def test_estimators_with_a_loss_of_their_own_go_backward_once(gradient: str, target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y, loss = torch.randn(8, 4), torch.arange(8) % 3, nn.CrossEntropyLoss()
    labelled: Any = {"context": "label", "num_classes": 3} if gradient == "local_loss" else {}
    net = dnifx.decouple(model, ["1"], args=(x,), gradient=gradient, loss=loss, **labelled)
    (interface,) = net.program.interfaces
    head: Any = interface.estimator
    passes = []
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, __, output: output.register_hook(lambda _: passes.append(1)) and None)
    if target == "fused":
        torch.autograd.backward(loss(net(x, **({"context": y} if labelled else {"target": y})), y))
    else:
        net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(x, target=y)
    assert len(passes) == sum(isinstance(layer, nn.Linear) for layer in head.modules())
