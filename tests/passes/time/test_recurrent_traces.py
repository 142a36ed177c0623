"""Eligibility traces of a cut in time: against Jacobians by hand, the lambda-return, and the true gradient."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import CutError, DnifxError, EstimatorError, InputError
from dnifx.estimators import BoundarySpec, BPLambda, SyntheticState
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

LINEAR, HIDDEN = SyntheticState(hidden=0), SyntheticState(width=2)


def traced(case: Case, share: float | None, gradient: Any = LINEAR, seed: int = 0, lr: float = 0.0) -> dnifx.Trainer:
    """Return the trainer of a case whose estimator's weights are random."""
    net = replace(case, cut=replace(case.cut, trace=share)).decouple(gradient)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.interface_parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=lr))


def estimator_of(trainer: dnifx.Trainer) -> nn.Module:
    interface = trainer.net.program.recurrences[0].interface
    assert interface is not None
    return interface.estimator


def watched(trainer: dnifx.Trainer) -> list[list[Tensor]]:
    """Return a list that gets the estimator's gradients before each fit."""
    seen: list[list[Tensor]] = []
    (optimizer,) = trainer.estimator_optimizers.values()

    def look(*_: object) -> None:
        seen.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in estimator_of(trainer).parameters()]
        )

    optimizer.register_step_pre_hook(look)
    return seen


def run(case: Case, trainer: dnifx.Trainer, begins: Sequence[Tensor]) -> list[list[Tensor]]:
    """Train on all windows and return the estimator's gradient in each."""
    seen = watched(trainer)
    for x, target, begin in zip(case.inputs, case.targets, begins, strict=True):
        trainer.reset(begin)
        trainer.step(x, target=target)
    return seen


def starts(case: Case, seed: int, share: float = 0.3) -> list[Tensor]:
    """Draw where episodes begin, for each window; none does at the first."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(case.batch, generator=generator) < share for _ in case.inputs[1:]]
    return [torch.zeros(case.batch, dtype=torch.bool), *drawn]


def in_a_row(state: Any) -> Tensor:
    """Return the differentiable tensors of a state beside each other, [batch, state]."""
    return torch.cat(list(map(by_rows, floating(state))), 1)


def with_values(state: Any, row: Tensor) -> Any:
    """Return a state of the same structure with other values."""
    parts = iter(row.split([by_rows(value).size(1) for value in floating(state)], 1))
    return pytree.tree_map(lambda value: as_state(next(parts), value) if value.is_floating_point() else value, state)


class TraceByHand:
    """The trace by its definition, with whole Jacobians."""

    def __init__(self, case: Case, estimator: nn.Module, share: float) -> None:
        self.case, self.estimator, self.share = case, estimator, share
        self.state, self.passed = case.state, torch.zeros(())

    def own(self, row: Tensor) -> Tensor:
        """Return dg/dphi of one example, [state, parameters]."""
        names = [name for name, _ in self.estimator.named_parameters()]
        sizes = [by_rows(value).size(1) for value in floating(self.state)]

        def answer(*weights: Tensor) -> Tensor:
            made = functional_call(self.estimator, dict(zip(names, weights, strict=True)), (row[None].split(sizes, 1),))
            return torch.cat([each.flatten() for each in made])

        each = jacobian(answer, tuple(p.detach() for p in self.estimator.parameters()))
        return torch.cat([part.flatten(1) for part in each], 1)

    def window(self, index: int, begin: Tensor) -> Tensor:
        """Run a window; return the gradient of the fit."""
        case, scale = self.case, self.case.cut.scale
        parts = [by_rows(value) for value in floating(self.state)]
        estimate = torch.cat(self.estimator(tuple(parts)), 1).detach()
        trace = scale * self.share * self.passed + torch.stack([self.own(row) for row in torch.cat(parts, 1)])
        first = rows_zeroed(self.state, begin, case.batch)
        left = window_by_hand(case, index, first).left
        ended = floating(left)
        answers = self.estimator(tuple(map(by_rows, ended)))
        back = [scale / case.batch * as_state(a.detach(), v) for a, v in zip(answers, ended, strict=True)]
        arrived = window_by_hand(case, index, first, back).arrived
        target = case.batch * torch.cat(list(map(by_rows, arrived)), 1) * ~begin[:, None]

        def end(row: Tensor) -> Tensor:
            return in_a_row(case.where(case.model(case.inputs[index], with_values(first, row)))[1])

        whole = jacobian(end, in_a_row(first))
        own = torch.stack([whole[example, :, example] for example in range(case.batch)])
        self.passed = own @ (trace * ~begin[:, None, None])
        self.state = left
        return 2 / case.batch * torch.einsum("bs,bsp->p", estimate - target, trace)


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("gradient", [LINEAR, HIDDEN], ids=["linear", "one hidden layer"])
@settings(max_examples=8)
@given(case=recurrent_cases(windows=4), share=st.sampled_from([0.5, 1.0]), seed=st.integers(0, 1000))
def test_the_trace_is_its_definition(gradient: SyntheticState, case: Case, share: float, seed: int) -> None:
    trainer = traced(case, share, gradient, seed, lr=0.02)
    by_hand = TraceByHand(case, estimator_of(trainer), share)
    seen = watched(trainer)
    for index, begin in enumerate(starts(case, seed)):
        expected = by_hand.window(index, begin)
        trainer.reset(begin)
        trainer.step(case.inputs[index], target=case.targets[index])
        assert torch.allclose(flat(seen[-1]), expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=10)
@given(recurrent_cases(windows=4, scale=1.0), st.integers(0, 1000))
def test_over_an_episode_lambda_one_is_the_fit_to_the_true_gradient(case: Case, seed: int) -> None:
    """TD(1): with weights that stay, the updates of an episode add up to the regression on what backpropagation gives."""
    trainer = traced(case, 1.0, HIDDEN, seed)
    last, every = torch.zeros(case.batch, dtype=torch.bool), torch.ones(case.batch, dtype=torch.bool)
    longer = replace(case, inputs=(*case.inputs, case.inputs[0]), targets=(*case.targets, case.targets[0]))
    found = run(longer, trainer, [*(last for _ in case.inputs), every])
    leaves = pytree.tree_map(lambda t: t.clone().requires_grad_(t.is_floating_point()), case.state)
    states, total = [leaves], torch.zeros((), dtype=torch.double)
    for x, target in zip(case.inputs, case.targets, strict=True):
        y, state = case.where(case.model(x, states[-1]))
        states.append(pytree.tree_map(torch.clone, state))  # apart from the window's own use of what it leaves
        total = total + loss(y, target)
    tensors = [tensor for state in states for tensor in floating(state)]
    true = torch.autograd.grad(total, tensors, materialize_grads=True)
    made = [
        each for state in states for each in estimator_of(trainer)(tuple(by_rows(v.detach()) for v in floating(state)))
    ]
    error = torch.stack([((one - case.batch * by_rows(t)) ** 2).sum() for one, t in zip(made, true, strict=True)]).sum()
    expected = torch.autograd.grad(error / case.batch, list(estimator_of(trainer).parameters()))
    assert torch.allclose(sum(map(flat, found), torch.zeros(())), flat(expected), rtol=1e-10, atol=1e-10)


@settings(max_examples=10)
@given(recurrent_cases(windows=4), st.sampled_from([0.25, 0.75, 1.0]), st.integers(0, 1000))
def test_the_backward_view_is_the_forward_view(case: Case, share: float, seed: int) -> None:
    """With weights that stay, the traces' updates add up to those of one chain of windows under ``BPLambda``."""
    begins = starts(case, seed)
    trainer = traced(case, share, HIDDEN, seed)
    found = run(case, trainer, begins)
    net = case.decouple(BPLambda(share, HIDDEN))
    inner = net.program.recurrences[0].interface.estimator.get_submodule("inner")  # type: ignore[union-attr]
    inner.load_state_dict(estimator_of(trainer).state_dict())
    state, total = case.state, torch.zeros((), dtype=torch.double)
    for x, target, begin in zip(case.inputs, case.targets, begins, strict=True):
        y, state = case.where(net(x, state, reset=begin))
        total = total + loss(y, target)
    total.backward()  # type: ignore[no-untyped-call]
    expected = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in net.interface_parameters()])
    assert torch.allclose(sum(map(flat, found), torch.zeros(())), expected, rtol=1e-10, atol=1e-11)


@settings(max_examples=8)
@given(recurrent_cases(windows=4), st.integers(0, 1000))
def test_nought_is_the_fit_to_one_window(case: Case, seed: int) -> None:
    begins = starts(case, seed)
    plain, zero = (run(copy.deepcopy(case), traced(case, share, HIDDEN, seed), begins) for share in (None, 0.0))
    assert all(torch.allclose(flat(a), flat(b), rtol=1e-11, atol=1e-13) for a, b in zip(plain, zero, strict=True))


@settings(max_examples=8)
@given(recurrent_cases(windows=5), st.integers(0, 1000))
def test_a_resumed_run_takes_the_trace_up_bit_for_bit(case: Case, seed: int) -> None:
    other, begins = copy.deepcopy(case), starts(case, seed)
    trainer = traced(case, 0.9, seed=seed, lr=0.05)
    for index, begin in enumerate(begins):
        trainer.reset(begin)
        if index == 3:
            saved = copy.deepcopy(trainer.state_dict())
            (trace,) = saved["parts"][0]["window"]["traces"].values()
            assert len(trace) == case.batch
        trainer.step(case.inputs[index], target=case.targets[index])
    resumed = traced(other, 0.9, seed=seed + 1, lr=0.05)
    resumed.load_state_dict(saved)
    for index in (3, 4):
        resumed.step(case.inputs[index], target=case.targets[index])
        resumed.reset(begins[4] if index == 3 else None)
    assert all(map(torch.equal, trainer.net.parameters(), resumed.net.parameters()))


def gru(
    trace: float | None = 0.9, batch: int = 2, **options: Any
) -> tuple[Stacked, dnifx.Recurrent, tuple[Tensor, Tensor]]:
    return (
        Stacked(nn.GRU, 1, True),
        dnifx.Recurrent("state", "1", trace=trace, **options),
        (torch.randn(batch, 3, 3), torch.zeros(1, batch, 4)),
    )


def test_a_step_that_fits_nothing_ends_the_trace() -> None:
    model, cut, args = gru()
    net = dnifx.decouple(model, cut, args=args, gradient=LINEAR, loss=nn.MSELoss())
    trainer = net.trainer(
        lambda parameters: torch.optim.SGD(parameters, lr=0.1), schedule=dnifx.schedules.random_order(0.5)
    )
    held = []
    for step in range(12):
        actions = str(trainer.source.at(step, net.program))
        trainer.step(args[0], target=torch.zeros(2, 3, 2))
        held.append((("B0" in actions), set(trainer.parts[0].window.traces)))
    assert {(True, True), (False, False)} == {(fitted, bool(keys)) for fitted, keys in held}


class Normalised(nn.Module):
    """An estimator whose estimates depend on the other examples."""

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(spec.values[0].shape[1])

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.norm(values[0]),)


@pytest.mark.parametrize(
    ("cut", "gradient", "kind", "text"),
    [
        ({"trace": 1.5}, LINEAR, CutError, "got trace=1.5; give a lambda from 0"),
        ({"into_core": True}, LINEAR, CutError, "no error of one window that could reach the core"),
        ({}, BPLambda(0.5, LINEAR), EstimatorError, "waits for later windows"),
        ({}, Normalised, EstimatorError, "cannot be differentiated separately"),
        ({"batch": 200_000}, SyntheticState(width=500), EstimatorError, "GiB, more than 1"),
    ],
    ids=["range", "into core", "chain", "batch norm", "size"],
)
def test_what_has_no_trace_is_refused(cut: dict[str, Any], gradient: Any, kind: type[DnifxError], text: str) -> None:
    model, asked, args = gru(**cut)
    with pytest.raises(kind, match=text):
        dnifx.decouple(model, asked, args=args, gradient=gradient, verify=False)


class TwoStates(nn.Module):
    """Two cells that share a window."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.GRUCell(3, 4), nn.GRUCell(4, 4)

    def forward(self, x: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = self.one(x, one)
        two = self.two(one, two)
        return two.sum(1), one, two


def test_a_trace_takes_a_trainer_and_the_whole_state(tmp_path: Path) -> None:
    model, cut, args = gru()
    net = dnifx.decouple(model, cut, args=args, gradient=LINEAR, loss=nn.MSELoss())
    assert "scale 0.1, trace 0.9" in str(net)
    with pytest.raises(InputError, match="which a trainer alone keeps"):
        net(*args)
    with pytest.raises(DnifxError, match="cannot be written to a folder"):
        net.to_folder(tmp_path / "never")
    with pytest.raises(CutError, match="need the window in one partition, but there are 2"):
        dnifx.decouple(model, ["core", cut], args=args)
    zero = torch.zeros(2, 4)
    cuts = [dnifx.Recurrent("one", "1", trace=0.5), dnifx.Recurrent("two", "2")]
    with pytest.raises(CutError, match="but the state is cut into 2 boundaries"):
        dnifx.decouple(TwoStates(), cuts, args=(torch.randn(2, 3), zero, zero))


def test_a_trace_is_of_one_batch_size() -> None:
    model, cut, (x, state) = gru()
    trainer = dnifx.decouple(model, cut, args=(x, state), gradient=LINEAR, loss=nn.MSELoss()).trainer(torch.optim.SGD)
    trainer.step(x, target=torch.zeros(2, 3, 2))
    with pytest.raises(InputError, match="the trace of a cut in time is of 2 examples, the batch has 5"):
        trainer.step(torch.randn(5, 3, 3), torch.zeros(1, 5, 4), target=torch.zeros(5, 3, 2))
