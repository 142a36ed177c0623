"""Cuts in time as properties of random recurrent models, against backpropagation written by hand."""

import copy
import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx.errors import CutError, DnifxError, EstimatorError, InputError
from dnifx.estimators import BoundarySpec, GradientEstimator, SyntheticState
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


class NeedsTheLoss(GradientEstimator):
    """An estimator that a window cannot serve."""

    needs_loss = True

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        return (*map(torch.zeros_like, values), torch.zeros(len(values[0])))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


class Known(nn.Module):
    """Answers with what a table says of the state it is asked about, zero for any other."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.table: list[tuple[list[Tensor], list[Tensor]]] = []

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        answer: Sequence[Tensor] = [torch.zeros_like(value) for value in values]
        for state, gradients in self.table:
            if torch.equal(state[0], values[0]):
                answer = gradients
        return tuple(each + 0 * self.anchor for each in answer)


def full_backpropagation(case: Case) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
    """Return the gradients of the loss over all windows, the states between them, and the true gradient at each."""
    state, losses, whole = case.state, [], []
    for x, target in zip(case.inputs, case.targets, strict=True):
        y, state = case.where(case.model(x, state))
        losses.append(loss(y, target))
        whole.append(state)
    states = list(map(floating, whole))
    parameters = list(case.model.parameters())
    full = torch.autograd.grad(torch.stack(losses).sum(), parameters, retain_graph=True, materialize_grads=True)
    later = [[torch.zeros_like(value) for value in states[-1]]]
    for index in reversed(range(1, len(losses))):
        later.insert(0, window_by_hand(case, index, whole[index - 1], later[0]).arrived)
    return list(full), states, later


def gradients_over_windows(case: Case, net: dnifx.DecoupledModule) -> list[Tensor]:
    """Return the sum over windows of the gradients that the fused module gives."""
    case.model.zero_grad()
    state = case.state
    for x, target in zip(case.inputs, case.targets, strict=True):
        y, state = case.where(net(x, state))
        loss(y, target).backward()  # type: ignore[no-untyped-call]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in case.model.parameters()]


def largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@settings(max_examples=12)
@given(recurrent_cases())
def test_a_zero_interface_is_truncated_backpropagation(case: Case) -> None:
    plain = copy.deepcopy(case.model)
    by_hand = Case(plain, case.cut, case.state, case.inputs, case.targets, case.where)
    trainer = case.decouple("zero").trainer(sgd)
    state = case.state
    for index, (x, target) in enumerate(zip(case.inputs, case.targets, strict=True)):
        expected = window_by_hand(by_hand, index, state)
        result = trainer.step(x, target=target)
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), expected.gradients, strict=True):
                parameter.add_(0 if gradient is None else gradient, alpha=-0.05)
        state = expected.left
        assert result.loss is not None
        assert torch.equal(result.loss, expected.loss)
        assert all(map(torch.equal, floating(case.where(result.output)[1]), floating(state)))
        assert all(map(torch.equal, case.model.parameters(), plain.parameters()))


@settings(max_examples=12)
@given(recurrent_cases())
def test_a_fresh_estimator_changes_nothing_until_its_first_fit(case: Case) -> None:
    net = case.decouple()
    truncated = gradients_over_windows(case, case.decouple("zero"))
    assert all(map(torch.equal, gradients_over_windows(case, net), truncated))
    with torch.no_grad():
        for parameter in net.program.recurrences[0].interface.estimator.parameters():  # type: ignore[union-attr]
            parameter += 0.1
    assert largest(gradients_over_windows(case, net), truncated) > 1e-8


@settings(max_examples=12)
@given(recurrent_cases(scale=1.0))
def test_the_true_gradient_at_each_boundary_gives_full_backpropagation(case: Case) -> None:
    full, states, later = full_backpropagation(case)
    known = Known()
    known.table = [
        ([by_rows(value.detach()) for value in state], [case.batch * by_rows(value) for value in gradients])
        for state, gradients in zip(states, later, strict=True)
    ]
    assert largest(gradients_over_windows(case, case.decouple(lambda spec: known)), full) < 1e-10
    assert largest(gradients_over_windows(case, case.decouple("zero")), full) > 1e-10


@settings(max_examples=12)
@given(recurrent_cases(windows=2, scale=1.0))
def test_the_oracle_backpropagates_through_windows(case: Case) -> None:
    full, _, _ = full_backpropagation(case)
    net = case.decouple("oracle")
    case.model.zero_grad()
    state, total = case.state, torch.zeros((), dtype=torch.double)
    for x, target in zip(case.inputs, case.targets, strict=True):
        y, state = case.where(net(x, state))
        total = total + loss(y, target)
    total.backward()  # type: ignore[no-untyped-call]
    assert (
        largest([p.grad if p.grad is not None else torch.zeros_like(p) for p in case.model.parameters()], full) < 1e-10
    )
    with pytest.raises(DnifxError, match="train the fused module, with one loss over all windows"):
        net.trainer(sgd).step(case.inputs[0], target=case.targets[0])


@settings(max_examples=12)
@given(recurrent_cases(), st.data())
def test_each_side_of_a_boundary_is_counted_once(case: Case, data: st.DataObject) -> None:
    """The window's end adds the estimate to the state's gradient; its start sends nothing back and fits the estimator."""
    net = case.decouple()
    estimator = net.program.recurrences[0].interface.estimator  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    start = torch.tensor(data.draw(st.lists(st.booleans(), min_size=case.batch, max_size=case.batch)))
    left = window_by_hand(case, 0, case.state).left
    begins = rows_zeroed(left, start, case.batch)
    ended = floating(window_by_hand(case, 1, begins).left)
    answers = [answer.detach() for answer in estimator(tuple(map(by_rows, ended)))]
    given_back = [
        case.cut.scale / case.batch * as_state(answer, value) for answer, value in zip(answers, ended, strict=True)
    ]
    expected = window_by_hand(case, 1, begins, given_back)
    targets = [case.batch * by_rows(value) * ~start[:, None] for value in expected.arrived]
    made = estimator(tuple(by_rows(value) for value in floating(left)))
    error = sum(((a - t) ** 2).sum() for a, t in zip(made, targets, strict=True)) / case.batch
    fit = torch.autograd.grad(error, list(estimator.parameters()))
    net.zero_grad()
    y, _ = case.where(net(case.inputs[1], left, reset=start))
    loss(y, case.targets[1]).backward()  # type: ignore[no-untyped-call]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in case.model.parameters()]
    wanted = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(case.model.parameters(), expected.gradients, strict=True)
    ]
    assert largest(found, wanted) < 1e-12
    assert largest([p.grad for p in estimator.parameters() if p.grad is not None], fit) < 1e-10


@pytest.mark.parametrize("cuts", [(), ("readout",), ("core",)], ids=["alone", "before the end", "after the core"])
@settings(max_examples=10)
@given(case=recurrent_cases(windows=5), seed=st.integers(0, 1000))
def test_both_targets_agree_window_after_window(cuts: Sequence[str], case: Case, seed: int) -> None:
    if (cuts and not isinstance(case.model, Stacked)) or cuts == ("readout",):
        cuts = ()
    other = copy.deepcopy(case)
    torch.manual_seed(seed)
    net = case.decouple(cuts=cuts)
    torch.manual_seed(seed)
    trainer = other.decouple(cuts=cuts).trainer(sgd)
    optimizer = sgd(net.parameters())
    state, start = case.state, None
    for x, target in zip(case.inputs, case.targets, strict=True):
        optimizer.zero_grad()
        y, state = case.where(net(x, state, reset=start))
        value = loss(y, target)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        result = trainer.step(x, target=target)
        assert result.loss is not None
        assert torch.equal(result.loss, value.detach())
        assert all(map(torch.equal, net.parameters(), trainer.net.parameters()))
        start = torch.rand(case.batch) < 0.4
        trainer.reset(start)


@settings(max_examples=10)
@given(recurrent_cases(windows=4), st.integers(0, 1000))
def test_a_resumed_run_continues_bit_for_bit(case: Case, seed: int) -> None:
    other = copy.deepcopy(case)
    torch.manual_seed(seed)
    trainer = case.decouple().trainer(sgd)
    for index in range(4):
        if index == 2:
            trainer.reset(torch.arange(case.batch) == 0)
            saved = copy.deepcopy(trainer.state_dict())
        trainer.step(case.inputs[index], target=case.targets[index])
    resumed = other.decouple().trainer(sgd)
    resumed.load_state_dict(saved)
    for index in (2, 3):
        resumed.step(case.inputs[index], target=case.targets[index])
    assert all(map(torch.equal, trainer.net.parameters(), resumed.net.parameters()))


def lstm(batch: int = 2) -> tuple[Stacked, Tensor, tuple[Tensor, Tensor]]:
    zero = torch.zeros(1, batch, 4)
    return Stacked(nn.LSTM, 1, True), torch.randn(batch, 3, 3), (zero, zero)


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        (dnifx.Recurrent("stat", "1"), "the inputs of Stacked has nothing at 'stat': no 'stat' among 'state'"),
        (dnifx.Recurrent("state", "2"), "the output of Stacked has nothing at '2': no '2' among"),
        (dnifx.Recurrent("state", "0"), "has 2 tensors and its next state 1"),
        (dnifx.Recurrent("state.0", "0"), "return a next state of the state's shape and dtype"),
        (dnifx.Recurrent("state", "1", batch_dim=3), "no dimension 3"),
    ],
)
def test_a_cut_in_time_that_is_none_says_why(cut: dnifx.Recurrent, text: str) -> None:
    model, x, state = lstm()
    with pytest.raises(CutError, match=text):
        dnifx.decouple(model, cut, args=(x, state))


def test_a_mask_of_another_size_is_refused() -> None:
    model, x, state = lstm()
    trainer = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(x, state), loss=nn.MSELoss()).trainer(sgd)
    trainer.reset(torch.ones(2, dtype=torch.bool))
    trainer.step(x, target=torch.zeros(2, 3, 2))
    with pytest.raises(InputError, match="give one boolean for each of the 2 examples"):
        trainer.reset(torch.ones(3, dtype=torch.bool))


def test_an_estimator_that_needs_the_loss_is_refused() -> None:
    model, x, state = lstm()
    with pytest.raises(EstimatorError, match="is a cut in time"):
        dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(x, state), gradient=lambda spec: NeedsTheLoss())


def test_the_estimator_reads_what_it_is_told_to() -> None:
    model, x, state = lstm()
    reads = SyntheticState(reads=(0,), width=7)
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(x, state), gradient={"state": reads})
    (boundary,) = net.program.recurrences
    assert [tuple(spec.shape) for spec in boundary.specs] == [(2, 4), (2, 4)]
    assert boundary.interface is not None
    assert [tuple(p.shape) for p in boundary.interface.estimator.parameters()] == [(7, 4), (7,), (8, 7), (8,)]
    with pytest.raises(EstimatorError, match="cannot read a state of 2 values"):
        SyntheticState(reads=(2,))(BoundarySpec("state", boundary.specs))


def test_a_step_says_where_episodes_begin_to_the_original_too() -> None:
    model, x, _ = lstm()
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))))
    state = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    start = torch.tensor([True, False])
    with torch.no_grad():
        expected = net(x, state, reset=start)[0]
    assert torch.equal(net(x, state, reset=start)[0], expected)
    assert torch.equal(model(x, tuple(value * ~start[None, :, None] for value in state))[0], expected)


def test_states_are_given_back_detached_and_diagnosed() -> None:
    model, x, state = lstm()
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(x, state), loss=nn.MSELoss())
    _, left = net(x, state)
    assert not any(value.requires_grad for value in left)
    result = net.trainer(sgd).step(x, target=torch.zeros(2, 3, 2), diagnose=True)
    assert set(result.diagnostics["state"]) >= {"cosine", "relative_error"}
    assert "cut in time at state" in str(net)


def only_outside(net: dnifx.DecoupledModule) -> dnifx.Trainer:
    """Return a trainer that moves the estimators and leaves the model's gradients to be looked at."""
    return net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0), estimator_optimizer=sgd)


@pytest.mark.parametrize("option", ["into_core", "auxiliary"])
@settings(max_examples=8)
@given(case=recurrent_cases(windows=2), seed=st.integers(0, 1000))
def test_the_estimators_own_error_reaches_the_core_when_asked(option: str, case: Case, seed: int) -> None:
    """In the second window the core's gradient differs by that of the estimator's (or the head's) mean squared error."""
    gradients: list[list[Tensor]] = []
    for cut in (case.cut, replace(case.cut, into_core=option == "into_core", auxiliary=option == "auxiliary")):
        each = replace(copy.deepcopy(case), cut=cut)
        torch.manual_seed(seed)
        trainer = only_outside(each.decouple())
        boundary = trainer.net.program.recurrences[0]
        assert boundary.interface is not None
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in boundary.interface.estimator.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
            for parameter in boundary.head.parameters() if boundary.head is not None else ():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        seen = watch_gradients(trainer)
        trainer.step(each.inputs[0], target=each.targets[0])
        learners = copy.deepcopy((boundary.interface.estimator, boundary.head))
        trainer.step(each.inputs[1], target=each.targets[1])
        gradients.append(seen[1])
    error = error_in_second_window(replace(each, cut=case.cut), learners, option)
    expected = torch.autograd.grad(error, list(each.model.parameters()), materialize_grads=True)
    found = [with_error - without for without, with_error in zip(*gradients, strict=True)]
    assume(max(float(gradient.abs().max()) for gradient in expected) > 0)  # a ReLU of the head may be dead
    assert largest(found, expected) < 1e-10


def watch_gradients(trainer: dnifx.Trainer) -> list[list[Tensor]]:
    """Return a list that gets the model's gradients before each update."""
    seen: list[list[Tensor]] = []
    (optimizer,) = trainer.optimizers.values()

    def look(*_: object) -> None:
        model = trainer.net.original
        seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])

    optimizer.register_step_pre_hook(look)
    return seen


def error_in_second_window(case: Case, learners: tuple[nn.Module, nn.Module | None], option: str) -> Tensor:
    """Return the error of the estimator at the second window's start, or of the head, attached to the core."""
    estimator, head = learners
    _, again = case.where(case.model(case.inputs[0], case.state))
    first = window_by_hand(case, 0, case.state).left
    last = floating(window_by_hand(case, 1, first).left)
    start = tuple(map(by_rows, floating(again)))
    ended = tuple(answer.detach() for answer in estimator(tuple(map(by_rows, last))))
    if option == "auxiliary" and head is not None:
        return sum_of_squares(head(start), ended) / case.batch
    given_back = [case.cut.scale / case.batch * as_state(each, value) for each, value in zip(ended, last, strict=True)]
    targets = [case.batch * by_rows(value) for value in window_by_hand(case, 1, first, given_back).arrived]
    return sum_of_squares(estimator(start), targets) / case.batch


def sum_of_squares(made: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return torch.stack([((one - target) ** 2).sum() for one, target in zip(made, targets, strict=True)]).sum()


def test_an_error_that_reaches_the_core_takes_a_trainer_and_a_whole_window() -> None:
    model, x, state = lstm()
    cut = dnifx.Recurrent("state", "1", into_core=True)
    with pytest.raises(InputError, match="which a trainer alone keeps"):
        dnifx.decouple(model, cut, args=(x, state))(x, state)
    with pytest.raises(CutError, match="need the window in one partition, but there are 2"):
        dnifx.decouple(model, ["core", cut], args=(x, state))


def test_a_folder_trains_windows_as_the_module_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, state = lstm(batch=4)
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1"), args=(x, state), loss=nn.MSELoss())
    net.to_folder(tmp_path / "windows_in_a_folder")
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("windows_in_a_folder")
    trainer, fused, scheduled = net.trainer(sgd), package.Net(), package.Trainer(package.Net(), sgd, first_of_two)
    optimizer = sgd(fused.parameters())
    left, carried = state, state
    for _ in range(4):
        x, target, start = torch.randn(4, 3, 3), torch.randn(4, 3, 2), torch.rand(4) < 0.4
        trainer.reset(start)
        scheduled.window.mask = start if trainer.steps else None
        result = trainer.step(x, target=target)
        optimizer.zero_grad()
        y, left = fused(x, *left, reset=scheduled.window.mask)
        value = nn.functional.mse_loss(y, target)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found, output, _ = scheduled.step(x, *carried, target)
        carried = tuple(each.detach() for each in output[1])
        assert result.loss is not None
        assert torch.equal(result.loss, value.detach())
        assert torch.equal(result.loss, found.detach())


def first_of_two(output: tuple[Tensor, Any], target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output[0], target)


def test_a_folder_cannot_compute_the_last_window_again(tmp_path: Path) -> None:
    model, x, state = lstm()
    net = dnifx.decouple(model, dnifx.Recurrent("state", "1", auxiliary=True), args=(x, state))
    with pytest.raises(DnifxError, match="cannot be written to a folder"):
        net.to_folder(tmp_path / "never")


def test_a_next_state_crosses_no_cut_inside_the_model() -> None:
    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.mix, self.out = nn.GRUCell(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.cell(x, h)
            return self.out(torch.tanh(self.mix(h))), h

    args = torch.randn(5, 3), torch.zeros(5, 4)
    net = dnifx.decouple(Core(), [dnifx.Recurrent("h", "1"), "mix"], args=args)
    assert [(each.name, each.values) for each in net.program.boundaries] == [("mix", ("mix",))]
