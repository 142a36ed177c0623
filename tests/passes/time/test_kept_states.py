"""A state that a model keeps on itself, cut in time: held to the same model with the state as an input and an output."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import dnifx
from dnifx.errors import CutError, DnifxError, InputError
from tests.passes.time.recurrent_models import Case, loss, recurrent_cases


class Keeps(nn.Module):
    """Keeps the state of another model in an attribute."""

    def __init__(self, case: Case, first: Any) -> None:
        super().__init__()
        self.inner, self.memory, self.where = copy.deepcopy(case.model), first, case.where

    def forward(self, x: Tensor) -> Tensor:
        y, self.memory = self.where(self.inner(x, self.memory))
        return y  # type: ignore[no-any-return]


class Holds(nn.Module):
    """A layer around a model that keeps a state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def in_two_forms(case: Case, gradient: str, nested: bool) -> tuple[dnifx.DecoupledModule, dnifx.DecoupledModule, Any]:
    """Return the net of a model that keeps its state, that of the model that is given it, and what holds the kept state."""
    holder = Keeps(case, case.state)
    model, path = (Holds(holder), "inner.memory") if nested else (holder, "self.memory")
    cut = dnifx.Recurrent(path, scale=case.cut.scale)
    nets = []
    for build in (
        lambda: dnifx.decouple(model, cut, args=case.inputs[:1], gradient=gradient, loss=loss),
        lambda: case.decouple(gradient),
    ):
        torch.manual_seed(0)
        nets.append(build())
    return nets[0], nets[1], holder


def check_same(one: nn.Module, other: nn.Module) -> None:
    for own, given_one in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, given_one)


@settings(max_examples=10)
@given(recurrent_cases(windows=4), st.sampled_from(["synthetic", "zero"]), st.booleans(), st.data())
def test_a_kept_state_trains_as_one_that_is_given_and_returned(
    case: Case, gradient: str, nested: bool, data: Any
) -> None:
    """The scheduled target, then the fused one; some examples begin an episode in the third window."""
    own, other, holder = in_two_forms(case, gradient, nested)
    assert holder.memory is case.state
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=case.batch, max_size=case.batch)))
    trainers = own.trainer(sgd), other.trainer(sgd)
    state = case.state
    for index, (x, target) in enumerate(zip(case.inputs, case.targets, strict=True)):
        if index == 2:
            for each in trainers:
                each.reset(mask)
        results = (
            trainers[0].step(x, target=target),
            trainers[1].step(x, *([state] if index == 0 else []), target=target),
        )
        assert torch.equal(results[0].output, case.where(results[1].output)[0])
    check_same(own, other)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(holder.memory))

    holder.memory, optimizers = state, (sgd(own.parameters()), sgd(other.parameters()))
    for index, (x, target) in enumerate(zip(case.inputs, case.targets, strict=True)):
        reset = mask if index == 2 else None
        y, state = case.where(other(x, state, reset=reset))
        outputs = own(x, reset=reset), y
        assert torch.equal(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            loss(output, target).backward()
            optimizer.step()
    check_same(own, other)
    assert len(own.input_kinds) == 1


class Stateful(nn.Module):
    """An ordinary stateful recurrent network: None at first."""

    def __init__(self, detaches: bool = False) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.hidden: Any = None
        self.detaches = detaches

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x, self.hidden)
        self.hidden = tuple(each.detach() for each in state) if self.detaches else state
        return self.out(torch.tanh(y))  # type: ignore[no-any-return]


def stateful(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Stateful()
    cuts: list[Any] = ["rnn", dnifx.Recurrent("hidden")]
    return model, dnifx.decouple(model, cuts, args=(torch.randn(5, 6, 3),), loss=nn.MSELoss(), **options)


def test_none_is_where_streams_begin_in_both_targets() -> None:
    model, net = stateful()
    assert model.hidden is None
    trainer = net.trainer(sgd)
    for batch in (5, 2):
        for begins in (True, False):
            plain, x = copy.deepcopy(model), torch.randn(batch, 6, 3)
            plain.hidden = None if begins else plain.hidden
            assert torch.equal(trainer.step(x, target=torch.zeros(batch, 6, 2)).output, plain(x))
        trainer.reset()
    model.hidden = None
    for batch in (3, 3):
        plain, x = copy.deepcopy(model), torch.randn(batch, 6, 3)
        y = net(x)
        assert torch.equal(y, plain(x))
        y.sum().backward()
    assert not model.hidden[0].requires_grad
    with torch.no_grad():
        rows, plain = torch.tensor([True, False, True]), copy.deepcopy(model)
        for each in plain.hidden:
            each[:, rows] = 0
        assert torch.equal(net(x, reset=rows), plain(x))
    assert len(net.input_kinds) == 1
    trainer.step(torch.randn(3, 6, 3), target=torch.zeros(3, 6, 2))
    with pytest.raises(
        InputError, match=r"the state that is carried is of 3 examples, and the inputs are of 5. Call reset"
    ):
        trainer.step(torch.randn(5, 6, 3), target=torch.zeros(5, 6, 2))


def test_a_run_is_taken_up_in_the_middle_of_a_stream() -> None:
    def train(trainer: Any, begin: int, end: int) -> None:
        for number in range(begin, end):
            torch.manual_seed(number)
            trainer.step(torch.randn(5, 6, 3), target=torch.randn(5, 6, 2))

    whole, broken, other = (stateful()[1].trainer(sgd) for _ in range(3))
    train(whole, 0, 5)
    train(broken, 0, 3)
    broken.reset(torch.tensor([False] * 5))
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(other, 3, 5)
    check_same(whole.net, other.net)
    assert all(map(torch.equal, whole.net.original.hidden, other.net.original.hidden))


def test_a_probe_leaves_the_state_as_it_was() -> None:
    model, net = stateful()
    trainer, x, y = net.trainer(sgd), torch.randn(5, 6, 3), torch.zeros(5, 6, 2)
    trainer.step(x, target=y)
    before = model.hidden
    trainer.probe(x, target=y)
    assert model.hidden is before


def test_windows_that_wait_for_later_ones_are_backpropagation_through_all() -> None:
    torch.manual_seed(0)
    model = Stateful().double()
    plain = copy.deepcopy(model)
    windows = [torch.randn(5, 6, 3).double() for _ in range(3)]
    net = dnifx.decouple(
        model, dnifx.Recurrent("self.hidden"), args=(windows[0],), gradient="oracle", loss=nn.MSELoss()
    )
    for run in (net, plain):
        sum(F.mse_loss(run(x), torch.zeros(5, 6, 2).double()) for x in windows).backward()  # type: ignore[union-attr]
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.allclose(one.grad, two.grad, rtol=1e-10, atol=1e-12)


class Forgets(Stateful):
    """Assigns the state and never reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y, self.hidden = self.rnn(x)
        return self.out(y)  # type: ignore[no-any-return]


class Learned(Stateful):
    """Begins with something else than zeros."""

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is None:
            self.hidden = (torch.ones(1, len(x), 4), torch.ones(1, len(x), 4))
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "cut", "options", "says"),
    [
        (Stateful(detaches=True), dnifx.Recurrent("hidden"), {}, r"leave and read self.hidden without detach\(\)"),
        (Forgets(), dnifx.Recurrent("hidden"), {}, r"forward does not read self.hidden"),
        (Learned(), dnifx.Recurrent("hidden"), {}, r"starts from something else than zeros"),
        (Stateful(), dnifx.Recurrent("self.lost"), {}, r"Stateful has nothing at self.lost"),
        (Stateful(), dnifx.Recurrent("lost"), {}, r"has nothing at 'lost'"),
        (
            Stateful(),
            dnifx.Recurrent("hidden", into_core=True),
            {},
            r"into_core and auxiliary run the last window again",
        ),
        (Stateful(), dnifx.Recurrent("hidden"), {"every": {"out": 2}}, r"the model keeps this state on itself"),
    ],
)
def test_what_is_no_state_between_windows_is_refused(model: nn.Module, cut: Any, options: Any, says: str) -> None:
    cuts = ["rnn", cut] if options else [cut]
    with pytest.raises(DnifxError, match=says):
        dnifx.decouple(model, cuts, args=(torch.randn(5, 6, 3),), loss=nn.MSELoss(), **options)
    assert model.hidden is None


def test_two_names_of_one_state_are_refused() -> None:
    cuts = [dnifx.Recurrent("hidden"), dnifx.Recurrent("self.hidden")]
    with pytest.raises(CutError, match="two cuts in time name the same state"):
        dnifx.decouple(Stateful(), cuts, args=(torch.randn(5, 6, 3),))
