"""Late targets on one process: what each fit uses, beside a loop written by hand, and how a run resumes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import dnifx
from dnifx import estimators, schedules
from dnifx.errors import ScheduleError, StateError
from dnifx.runtime.decoupled import DecoupledModule

WIDTH, CLASSES = 6, 3
GRADIENTS: dict[str, Any] = {
    "linear": estimators.Synthetic(),
    "hidden": estimators.Synthetic(hidden=1, width=8),
    "sigmoid": "sigmoid_linear",
    "stale": estimators.Stale(0.5),
}

SCHEDULES = ("sequential", "fit_every{every=2}", "random_order{p=0.6,seed=1}", "warm_up{steps=3}")


class Chain(nn.Module):
    """Layers in a row; with ``skip``, the last one also takes what the first one made."""

    def __init__(self, layers: int, skip: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head, self.skip = nn.Linear(WIDTH, CLASSES), skip

    def forward(self, x: Tensor) -> Tensor:
        first = x = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        out: Tensor = self.head(x + first if self.skip else x)
        return out


def decoupled(layers: int, skip: bool, gradient: str, labelled: bool, seed: int) -> DecoupledModule:
    torch.manual_seed(seed)
    model = Chain(layers, skip).double()
    cuts = ["tanh" if index == 0 else f"tanh_{index}" for index in range(layers)]
    return dnifx.decouple(
        model,
        cuts,
        args=(torch.randn(4, WIDTH, dtype=torch.float64),),
        gradient=GRADIENTS[gradient],
        context="label" if labelled and gradient != "stale" else None,
        num_classes=CLASSES if labelled and gradient != "stale" else None,
        loss=cross_entropy,
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.5)


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of changing sizes."""
    made = torch.Generator().manual_seed(seed)
    sizes = [4 + step % 3 for step in range(count)]
    return [
        (torch.randn(n, WIDTH, dtype=torch.float64, generator=made), torch.randint(CLASSES, (n,), generator=made))
        for n in sizes
    ]


class ByHand:
    """The same training, written as a loop: partition after partition, and fits to targets of ``lag`` steps ago."""

    def __init__(self, net: DecoupledModule, lag: int) -> None:
        original: Any = net.original
        self.model = copy.deepcopy(original)
        self.lag, self.labelled = lag, net.program.context is not None
        self.estimators = [copy.deepcopy(each.estimator) for each in net.program.interfaces]
        self.layers: list[nn.Module] = [*self.model.layers, self.model.head]
        self.optimizers = [sgd(layer.parameters()) for layer in self.layers]
        self.fits = [sgd(each.parameters()) for each in self.estimators]
        self.kept: list[list[Any]] = [[] for _ in self.estimators]

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on a batch."""
        context = one_hot(y, CLASSES).double() if self.labelled else None
        leaves: list[Tensor] = []
        for place, layer in enumerate(self.layers[:-1]):
            value = torch.tanh(layer(leaves[-1] if leaves else x))
            estimate = self.estimators[place]((value.detach(),), context)[0]
            value.backward(estimate.detach() / len(x))
            self.apply(self.optimizers[place])
            self.fit(place - 1, leaves, context, arrives=not (self.model.skip and place == 1))
            leaves.append(value.detach().requires_grad_())
        last = leaves[-1] + leaves[0] if self.model.skip else leaves[-1]
        loss = cross_entropy(self.layers[-1](last), y)
        loss.backward()
        for place in sorted({len(leaves) - 1, *([0] if self.model.skip else [])}):
            self.fit(place, leaves, context, arrives=True)
        self.apply(self.optimizers[-1])
        return float(loss.detach())

    def fit(self, place: int, leaves: list[Tensor], context: Tensor | None, arrives: bool) -> None:
        """Keep the target of a boundary, if it has arrived, and fit the estimator to the one that is due."""
        if place < 0 or not arrives:
            return
        leaf = leaves[place]
        assert leaf.grad is not None
        self.kept[place].append((leaf.detach(), context, leaf.grad * len(leaf)))
        if len(self.kept[place]) > self.lag:
            value, seen, target = self.kept[place].pop(0)
            made = self.estimators[place]((value,), seen)[0]
            made.backward((made.detach() - target) * 2 / len(value))
            self.apply(self.fits[place])

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Update and forget the gradients."""
        optimizer.step()
        optimizer.zero_grad()


def same(one: nn.Module, other: nn.Module) -> None:
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@settings(max_examples=12)
@given(
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(sorted(GRADIENTS)),
    st.booleans(),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_a_lag_trains_as_the_loop_by_hand(
    layers: int, skip: bool, gradient: str, labelled: bool, lag: int, seed: int
) -> None:
    net = decoupled(layers, skip and layers > 1, gradient, labelled, seed)
    trainer, loop = net.trainer(sgd, lag=lag), ByHand(net, lag)
    for x, y in batches(9, seed):
        result = trainer.step(x, target=y)
        assert float(result.losses["loss"]) == pytest.approx(loop.step(x, y), rel=1e-9)
    same(net.original, loop.model)
    for interface, estimator in zip(net.program.interfaces, loop.estimators, strict=True):
        same(interface.estimator, estimator)


@settings(max_examples=8)
@given(
    st.sampled_from(sorted(GRADIENTS)),
    st.integers(1, 5),
    st.integers(0, 6),
    st.sampled_from(SCHEDULES),
)
def test_a_resumed_run_is_the_uninterrupted_one(gradient: str, lag: int, stop: int, schedule: str) -> None:
    whole, first, second = (decoupled(2, False, gradient, True, 0) for _ in range(3))
    data = batches(12, 0)
    through = whole.trainer(sgd, schedule, lag=lag)
    for x, y in data:
        through.step(x, target=y)
    before, after = first.trainer(sgd, schedule, lag=lag), second.trainer(sgd, schedule, lag=lag)
    for x, y in data[:stop]:
        before.step(x, target=y)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for x, y in data[stop:]:
        after.step(x, target=y)
    assert {name: each.tolist() for name, each in second.state_dict().items()} == {
        name: each.tolist() for name, each in whole.state_dict().items()
    }


def test_a_saved_state_is_not_changed_by_the_steps_after_it() -> None:
    net = decoupled(1, False, "linear", False, 0)
    trainer = net.trainer(sgd, lag=2)
    for x, y in batches(3, 0):
        trainer.step(x, target=y)
    state = trainer.state_dict()["parts"][0]["late"]
    before = copy.deepcopy(state)
    for x, y in batches(3, 1):
        trainer.step(x, target=y)
    assert repr(state) == repr(before)


def test_estimators_rest_until_a_target_is_due() -> None:
    net = decoupled(2, False, "linear", True, 0)
    trainer, moved = net.trainer(sgd, lag=3), []
    estimator = net.program.interfaces[-1].estimator
    for x, y in batches(6, 0):
        before = [each.detach().clone() for each in estimator.parameters()]
        trainer.step(x, target=y)
        moved.append(any(not torch.equal(*pair) for pair in zip(before, estimator.parameters(), strict=True)))
    assert moved == [False, False, False, True, True, True]


def test_what_the_caller_writes_later_is_not_what_was_kept() -> None:
    """Batches that are read into the same memory, and an output that is a boundary's value."""
    features: Callable[[Tensor], Tensor] = lambda context: context  # noqa: E731
    nets = []
    for reused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
        x = torch.randn(4, WIDTH, dtype=torch.float64)
        net = dnifx.decouple(model, ["1"], args=(x,), context=features, num_classes=2, loss=cross_entropy)
        trainer = net.trainer(sgd, lag=2)
        memory = torch.zeros(4, 2, dtype=torch.float64)
        for step in range(6):
            seen = torch.full((4, 2), float(step), dtype=torch.float64)
            given_context = memory.copy_(seen) if reused else seen
            trainer.step(x + step, target=torch.arange(4) % CLASSES, context=given_context)
        nets.append(net)
    assert all(torch.equal(*pair) for pair in zip(*(net.state_dict().values() for net in nets), strict=True))


def test_a_late_fit_is_compared_with_its_own_target() -> None:
    net = decoupled(1, False, "linear", True, 0)
    trainer = net.trainer(sgd, lag=2)
    found = [trainer.step(x, target=y, diagnose=True).diagnostics for x, y in batches(4, 0)]
    assert [set(each) for each in found] == [set(), set(), {"tanh"}, {"tanh"}]
    assert found[3]["tanh"]["target_norm"] > 0


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x) * mask.unsqueeze(-1))
        return out


def test_padding_counts_for_nothing_in_a_late_fit() -> None:
    """The mask of its own step goes with a target: other padding there changes nothing."""

    def run(padding: float) -> list[Tensor]:
        torch.manual_seed(0)
        x, mask = torch.randn(2, 4, WIDTH), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
        net = dnifx.decouple(
            Tokens(),
            ["embed"],
            args=(x, mask),
            mask="mask",
            loss=lambda output, target: (output - target).square().mean(),
        )
        trainer = net.trainer(sgd, lag=2)
        for step in range(6):
            shown = mask.roll(step, dims=0)
            given_x = torch.where(shown.unsqueeze(-1), x + step, torch.full_like(x, padding))
            trainer.step(given_x, shown, target=torch.zeros(2, 4, CLASSES))
        return [each.clone() for each in net.program.interfaces[0].estimator.parameters()]

    assert all(torch.allclose(*pair) for pair in zip(run(0.0), run(9.0), strict=True))


@pytest.mark.parametrize(
    ("gradient", "said"),
    [
        ("prop", "waits for the target"),
        ("critic", "the loss"),
        ("sobolev", "the loss"),
        ("bplambda", "waits for the target"),
    ],
)
def test_estimators_that_cannot_be_late_are_refused(gradient: str, said: str) -> None:
    torch.manual_seed(0)
    label: Any = {} if gradient in ("prop", "bplambda") else {"context": "label", "num_classes": CLASSES}
    net = dnifx.decouple(
        Chain(1, False), ["tanh"], args=(torch.randn(4, WIDTH),), gradient=gradient, loss=cross_entropy, **label
    )
    with pytest.raises(ScheduleError, match=said) as caught:
        net.trainer(sgd, lag=4)
    assert "boundary 0, 'tanh'" in str(caught.value)


def test_synthetic_inputs_and_lags_do_not_go_together() -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(
        Chain(1, False), ["tanh"], args=(torch.randn(4, WIDTH),), inputs="synthetic", loss=cross_entropy
    )
    with pytest.raises(ScheduleError, match="synthetic input model"):
        net.trainer(sgd, lag=4)


@pytest.mark.parametrize("gradient", ["zero", "local_loss", "direct_feedback"])
def test_estimators_without_a_target_learn_as_without_a_lag(gradient: str) -> None:
    results = []
    for lag in (0, 3):
        torch.manual_seed(0)
        net = dnifx.decouple(
            Chain(1, False),
            ["tanh"],
            args=(torch.randn(4, WIDTH),),
            gradient=gradient,
            context="label" if gradient == "local_loss" else None,
            num_classes=CLASSES if gradient == "local_loss" else None,
            loss=cross_entropy,
        )
        trainer = net.trainer(sgd, lag=lag)
        for x, y in batches(5, 0):
            trainer.step(x.float(), target=y)
        results.append(net.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("lag", [-1, True, 1.5, "auto"])
def test_what_is_no_lag_is_refused(lag: Any) -> None:
    with pytest.raises(ScheduleError, match="lag="):
        decoupled(1, False, "linear", False, 0).trainer(sgd, lag=lag)


def test_the_state_of_other_boundaries_is_refused() -> None:
    one, other = (decoupled(1, False, "linear", False, 0).trainer(sgd, lag=1) for _ in range(2))
    ((x, y),) = batches(1, 0)
    one.step(x, target=y)
    state = one.state_dict()
    state["parts"][0]["late"] = {"elsewhere": state["parts"][0]["late"]["tanh"]}
    with pytest.raises(StateError, match="elsewhere"):
        other.load_state_dict(state)


def test_a_lag_may_be_written_in_the_schedule() -> None:
    nets = [decoupled(1, False, "linear", True, 0) for _ in range(2)]
    trainers = [nets[0].trainer(sgd, lag=2), nets[1].trainer(sgd, "F0 S0 B0 U0 F1 B1 T0-2 M0-2 U1")]
    for x, y in batches(6, 0):
        for trainer in trainers:
            trainer.step(x, target=y)
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert isinstance(trainers[0].source, schedules.Lagged)
