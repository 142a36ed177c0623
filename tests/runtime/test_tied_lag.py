"""Tied parameters that are read late in one process: the numbers of a loop that is written out, and what goes with it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding
from torch.utils.checkpoint import checkpoint

import dnifx
from dnifx.doctor import Profile
from dnifx.doctor.memory import holdings
from dnifx.errors import ScheduleError
from dnifx.runtime.decoupled import DecoupledModule

WORDS, WIDTH, LENGTH = 7, 5, 3


class Words(nn.Module):
    """A language model whose embedding is its readout, with a layer between them."""

    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.embedding, self.inner, self.recomputes = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), recomputes
        self.readout = nn.Linear(WIDTH, WORDS, bias=False)
        self.readout.weight = self.embedding.weight

    def first(self, x: Tensor) -> Tensor:
        """Embed, with the weight in a matrix product too, whose backward pass needs its values."""
        one = self.embedding(x)
        return one + torch.tanh(one @ self.embedding.weight.T) @ self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.first, x, use_reentrant=False) if self.recomputes else self.first(x)
        out: Tensor = self.readout(torch.tanh(self.inner(h)))
        return out


def predicted(output: Tensor, words: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), words.flatten())


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    for _ in range(count):
        words = torch.randint(WORDS, (4, LENGTH + 1), generator=drawn)
        yield words[:, :-1], words[:, 1:]


def made(gradient: Any = "oracle", recomputes: bool = False) -> DecoupledModule:
    torch.manual_seed(0)
    x, _ = next(batches(1))
    model = Words(recomputes)
    fits: dict[str, Any] = {"estimator_optimizer": slow} if gradient == "synthetic" else {}
    return dnifx.decouple(model, ["inner"], args=(x,), gradient=gradient, loss=predicted, **fits)


def words(net: DecoupledModule) -> Words:
    assert isinstance(net.original, Words)
    return net.original


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def slow(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def written_out(lag: int, steps: int, accumulate: int) -> dict[str, Tensor]:
    """Train by hand: the embedding is read as it was after the step ``t - 1 - lag``, and the sum of gradients updates it."""
    torch.manual_seed(0)
    model = Words()
    weight, inner = model.embedding.weight, model.inner
    optimizer, earlier = sgd(model.parameters()), [weight.detach().clone()]
    for step, (x, y) in enumerate(batches(steps)):
        old = earlier[max(0, step - lag)].clone().requires_grad_()  # earlier[n] is what it was before step n
        one = embedding(x, old)
        h = inner(one + torch.tanh(one @ old.T) @ old)
        cut = h.detach().requires_grad_()
        predicted(nn.functional.linear(torch.tanh(cut), weight), y).backward()
        h.backward(cut.grad)
        assert weight.grad is not None
        assert old.grad is not None
        weight.grad += old.grad
        if step % accumulate == accumulate - 1:
            for each in model.parameters():
                assert each.grad is not None
                each.grad /= accumulate
            optimizer.step()
            optimizer.zero_grad()
        earlier.append(weight.detach().clone())
    return dict(model.state_dict())


@settings(max_examples=12)
@given(st.integers(0, 4), st.integers(1, 9), st.sampled_from([1, 1, 2, 3]), st.booleans())
def test_a_lag_is_that_of_a_loop_written_out(lag: int, steps: int, accumulate: int, recomputes: bool) -> None:
    net = made(recomputes=recomputes)
    trainer = net.trainer(sgd, tied_lag=lag, accumulate=accumulate)
    for x, y in batches(steps):
        trainer.step(x, target=y)
    for name, expected in written_out(lag, steps, accumulate).items():
        torch.testing.assert_close(net.original.state_dict()[name], expected, rtol=1e-4, atol=1e-6)


def trained(steps: int, *args: Any, gradient: Any = "synthetic", **options: Any) -> dict[str, Tensor]:
    net = made(gradient)
    trainer = net.trainer(sgd, *args, **options)
    for x, y in batches(steps):
        trainer.step(x, target=y)
    return dict(net.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_by_default_they_are_as_late_as_targets() -> None:
    default = trained(7, lag=2)
    assert same(default, trained(7, lag=2, tied_lag=2))
    assert same(default, trained(7, "F0-2 S0 B0 U0 F1 B1 T0-2 M0-2 U1-2 R1-2"))
    assert not same(default, trained(7, lag=2, tied_lag=0))
    assert same(trained(7, lag=2, tied_lag=0), trained(7, "F0 S0 B0 U0 F1 B1 T0-2 M0-2 U1"))
    assert same(trained(7, gradient="oracle", lag=2), trained(7, gradient="oracle"))  # it waits anyway


def test_without_tied_parameters_nothing_is_read_late() -> None:
    net = dnifx.decouple(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), ["1"], args=(torch.randn(2, 4),), loss=cross_entropy
    )
    assert net.trainer(sgd, lag=2, tied_lag=5).source.at(9, net.program).tied_lag == 0


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("options", [{"lag": 3}, {"tied_lag": 2}, {"lag": 1, "tied_lag": 4, "accumulate": 2}])
def test_what_is_under_way_is_saved(stop: int, options: dict[str, Any], tmp_path: Any) -> None:
    data = list(batches(9))
    whole, first, second, third = (made("synthetic") for _ in range(4))
    alone, before, after, read = (each.trainer(sgd, **options) for each in (whole, first, second, third))
    for x, y in data:
        alone.step(x, target=y)
    for x, y in data[:stop]:
        before.step(x, target=y)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    before.save(tmp_path / "run")
    read.load(tmp_path / "run")
    twin = copy.deepcopy(before)
    for trainer in (before, after, read, twin):
        for x, y in data[stop:]:
            trainer.step(x, target=y)
        assert same(dict(whole.state_dict()), dict(trainer.net.state_dict()))


def test_evaluation_probes_and_the_model_have_present_values() -> None:
    net = made("synthetic")
    trainer = net.trainer(sgd, lag=3)
    for x, y in batches(5):
        trainer.step(x, target=y)
        plain = copy.deepcopy(words(net))
        assert torch.equal(trainer.evaluate(x), plain(x))
        assert words(net).embedding.weight is words(net).readout.weight
        assert isinstance(words(net).embedding.weight, nn.Parameter)
        assert trainer.probe(x, target=y) is not None


def test_an_error_in_a_forward_pass_leaves_the_model_as_it_was() -> None:
    net = made("synthetic")
    weight = words(net).embedding.weight
    trainer = net.trainer(sgd, lag=1)
    x, y = next(batches(1))
    with pytest.raises(Exception, match="index"):
        trainer.step(x + WORDS, target=y)
    assert words(net).embedding.weight is weight
    assert words(net).readout.weight is weight


def test_what_goes_with_it() -> None:
    """Scaling, clipping and penalties act where a parameter is updated, on present values and the sum of gradients."""
    plain = trained(7, lag=2)
    scaled = trained(7, lag=2, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert all(torch.allclose(plain[name], scaled[name], atol=1e-6) for name in plain)
    decay = lambda own: 0.1 * sum(each.square().sum() for each in own.values())  # noqa: E731
    assert same(
        trained(1, lag=2, penalty=decay), trained(1, penalty=decay) | _estimators(trained(1, lag=2, penalty=decay))
    )
    assert not same(trained(7, lag=2, clip=0.1), plain)


def _estimators(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in state.items() if name.startswith("interfaces.")}


def test_a_gradient_that_is_not_finite_leaves_out_the_update_alone() -> None:
    net = made("synthetic")
    trainer = net.trainer(sgd, lag=2, on_nonfinite="skip", clip=0.5)
    data = list(batches(8))
    for step, (x, y) in enumerate(data):
        before = words(net).embedding.weight.detach().clone()
        with torch.no_grad():
            kept, bias = words(net).inner.bias.clone(), words(net).inner.bias
            if step == 3:
                bias.fill_(float("nan"))
        result = trainer.step(x, target=y)
        if step == 3:
            assert result.skipped
            assert torch.equal(words(net).embedding.weight, before)
            with torch.no_grad():
                bias.copy_(kept)
        assert words(net).embedding.weight.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"tied_lag": -1}, "tied_lag=-1"), ({"tied_lag": True}, "tied_lag=True"), ({"tied_lag": 1.0}, "tied_lag=1.0")],
)
def test_what_is_no_number_of_steps_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        made("synthetic").trainer(sgd, **options)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_what_is_kept_is_counted(lag: int) -> None:
    net = made("zero")
    trainer = net.trainer(sgd, lag=lag)
    for x, y in batches(lag + 2):
        trainer.step(x, target=y)
    state = trainer.parts[0].tied.state_dict()
    kept = [*state["now"].values(), *(each for due in state["due"].values() for each in due.values())]
    (held,) = holdings(net, Profile(4, {}, 0.0, {}), (0, 0), [0], lag)
    assert held.waiting == sum(each.nbytes for each in kept)
    apart = holdings(net, Profile(4, {}, 0.0, {}), (0, 1), [0, 0], lag)
    assert [each.waiting for each in apart] == [words(net).embedding.weight.nbytes if lag else 0, 0]
