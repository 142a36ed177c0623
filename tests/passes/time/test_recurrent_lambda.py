"""BP(lambda) in time: a chain of windows under one loss, against the lambda-return written by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import DnifxError, EstimatorError
from dnifx.estimators import BPLambda, Prop, SyntheticState, Zero
from tests.passes.time.recurrent_models import (
    Case,
    Stacked,
    as_state,
    by_rows,
    floating,
    loss,
    recurrent_cases,
    rows_zeroed,
    window_by_hand,
)

MIXED = SyntheticState(width=3)


def decoupled(case: Case, gradient: Any, seed: int = 0) -> dnifx.DecoupledModule:
    """Decouple a case; its estimator's weights are random."""
    net = case.decouple(gradient)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.interface_parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return net


def starts(case: Case, seed: int) -> list[Tensor]:
    """Draw where episodes begin, for each window; none does at the first."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(case.batch, generator=generator) < 0.3 for _ in case.inputs[1:]]
    return [torch.zeros(case.batch, dtype=torch.bool), *drawn]


def chain(case: Case, net: dnifx.DecoupledModule, begins: Sequence[Tensor], joined: bool = True) -> list[Tensor]:
    """Return the gradients, of the model and then of the estimator, of one loss over all windows."""
    net.zero_grad()
    state, total = case.state, torch.zeros((), dtype=torch.double)
    for x, target, begin in zip(case.inputs, case.targets, begins, strict=True):
        y, state = case.where(net(x, state, reset=begin))
        state = state if joined else pytree.tree_map(Tensor.detach, state)
        total = total + loss(y, target)
    total.backward()  # type: ignore[no-untyped-call]
    both = [*case.model.parameters(), *net.interface_parameters()]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in both]


def chain_by_hand(case: Case, estimator: nn.Module, begins: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return the same by the recursion: from the last window to the first, each with what the next one sends it."""
    states = [case.state]
    for index, begin in enumerate(begins):
        states.append(window_by_hand(case, index, rows_zeroed(states[-1], begin, case.batch)).left)
    answers = [estimator(tuple(map(by_rows, floating(state)))) for state in states]
    sums = [torch.zeros_like(p) for p in case.model.parameters()]
    error, given = torch.zeros((), dtype=torch.double), [answer.detach() for answer in answers[-1]]
    for index in reversed(range(len(begins))):
        ended = floating(states[index + 1])
        back = [case.cut.scale / case.batch * as_state(rows, v) for rows, v in zip(given, ended, strict=True)]
        first = rows_zeroed(states[index], begins[index], case.batch)
        window = window_by_hand(case, index, first, back)
        for total, gradient in zip(sums, window.gradients, strict=True):
            total += 0 if gradient is None else gradient
        returns = [case.batch * by_rows(value) * ~begins[index][:, None] for value in window.arrived]
        made = answers[index]
        error = error + sum(((a - r) ** 2).sum() for a, r in zip(made, returns, strict=True)) / case.batch
        given = [share * r + (1 - share) * a.detach() for a, r in zip(made, returns, strict=True)]
    learners = list(estimator.parameters())
    return [*sums, *(torch.autograd.grad(error, learners) if learners else ())]


def close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in zip(one, other, strict=True))


@settings(max_examples=15)
@given(recurrent_cases(windows=4), st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 1000))
def test_a_chain_of_windows_is_the_lambda_return(case: Case, share: float, seed: int) -> None:
    net = decoupled(case, BPLambda(share, MIXED), seed)
    begins = starts(case, seed)
    estimator = net.program.recurrences[0].interface.estimator  # type: ignore[union-attr]
    expected = chain_by_hand(case, estimator, begins, share)
    assert close(chain(case, net, begins), expected)
    assert not close(chain(case, net, begins, joined=False), expected) or all(map(torch.all, begins[1:]))


@settings(max_examples=12)
@given(recurrent_cases(), st.integers(0, 1000))
def test_nought_is_dni_bit_for_bit(case: Case, seed: int) -> None:
    begins = starts(case, seed)
    plain = decoupled(case, MIXED, seed)
    expected = chain(case, plain, begins)
    mixed = decoupled(case, BPLambda(0.0, MIXED), seed)
    assert all(map(torch.equal, chain(case, mixed, begins), expected))
    assert not mixed.program.recurrences[0].interface.locked  # type: ignore[union-attr]


@settings(max_examples=12)
@given(recurrent_cases(windows=4, scale=1.0), st.integers(0, 1000))
def test_one_is_backpropagation_through_the_windows_that_are_kept(case: Case, seed: int) -> None:
    """Beyond the last window stands the estimate, here that of an estimator that says 0; the model's gradients are the oracle's."""
    begins = starts(case, seed)
    expected = chain(case, case.decouple("oracle"), begins)
    assert close(chain(case, case.decouple(BPLambda(1.0, MIXED)), begins)[: len(expected)], expected)
    assert close(chain(case, case.decouple(BPLambda(1.0, Zero())), begins)[: len(expected)], expected)
    if isinstance(case.model, Stacked):
        both = case.decouple({"core": "oracle", "state": BPLambda(1.0, MIXED)}, cuts=["core"])
        assert len(both.partitions) == 2
        assert close(chain(case, both, begins)[: len(expected)], expected)


@settings(max_examples=12)
@given(recurrent_cases(windows=3), st.sampled_from([0.25, 0.5]), st.integers(0, 1000))
def test_with_a_zero_estimator_a_share_comes_through_each_boundary(case: Case, share: float, seed: int) -> None:
    begins = starts(case, seed)
    net = case.decouple(BPLambda(share, Zero()))
    estimator = net.program.recurrences[0].interface.estimator  # type: ignore[union-attr]
    found = chain(case, net, begins)
    assert close(found, chain_by_hand(case, estimator, begins, share))


def test_a_trainer_and_a_folder_say_that_they_see_one_window(tmp_path: Any) -> None:
    model = nn.LSTM(3, 4, batch_first=True)
    x, zero = torch.randn(2, 3, 3), torch.zeros(1, 2, 4)
    cut = dnifx.Recurrent("hx", "1")
    net = dnifx.decouple(model, cut, args=(x, (zero, zero)), gradient=BPLambda(0.5, MIXED), loss=nn.MSELoss())
    assert "# no training step: boundary 'hx' waits for the gradients of later windows" in net.code
    for use in (
        lambda: net.trainer(torch.optim.SGD).step(x, target=torch.zeros(2, 3, 4)),
        lambda: net.to_folder(tmp_path / "n"),
    ):
        with pytest.raises(DnifxError, match="train the fused module, with one loss over all windows"):
            use()
    with pytest.raises(EstimatorError, match="is a cut in time"):
        dnifx.decouple(model, cut, args=(x, (zero, zero)), gradient=Prop(0.5, MIXED))
