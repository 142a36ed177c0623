"""Contract 12: what a model keeps in Python after n calls of the net is what it keeps after n calls of the model."""

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from tests.random_models.stateful import WIDTH, AveragesInPlace, Block, Stateful, WarmsUp, kinds, state_of


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def check_calls(model: nn.Module, scheduled: bool, steps: list[str]) -> dnifx.DecoupledModule:
    """Train a net and its model side by side, by the oracle, and compare outputs, weights and what is kept.

    A step is a call in training mode, with another batch size, in evaluation mode with or without gradients, or a reset.
    """
    plain = copy.deepcopy(model)
    net = dnifx.decouple(model, ["first"], args=(torch.randn(3, WIDTH),), gradient="oracle", loss=nn.MSELoss())
    trainer = net.trainer(sgd) if scheduled else None
    own, other = sgd(model.parameters()), sgd(plain.parameters())
    before = {path: copy.deepcopy(state_of_attributes(each)) for path, each in plain.named_modules()}
    for number, step in enumerate(steps):
        if step == "reset":
            for each in (model, plain):
                put_back(each, copy.deepcopy(before))
        x = torch.randn(3, WIDTH) if step != "longer" else torch.randn(5, WIDTH)
        target = torch.randn(len(x), 2)
        outputs = []
        for run, optimizer in ((net, own), (plain, other)):
            run.train(not step.startswith("eval"))
            torch.manual_seed(number)
            if run is net and trainer is not None and net.training:
                outputs.append(trainer.step(x, target=target).output)
                continue
            with torch.set_grad_enabled(step != "eval without gradients"):
                outputs.append(run(x))
            if run.training:
                optimizer.zero_grad()
                nn.functional.mse_loss(outputs[-1], target).backward()
                optimizer.step()
        assert torch.equal(*outputs), step
        assert state_of(model) == state_of(plain), step
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)
    return net


def state_of_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module has beside those of torch."""
    known = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in known and not name.startswith("_")}


def put_back(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """Give the modules of a model the attributes that they had."""
    for path, module in model.named_modules():
        for name, value in before[path].items():
            setattr(module, name, value)


STEPS = ("train", "train", "train", "longer", "eval", "eval without gradients", "reset")


@settings(max_examples=12)
@given(kinds, st.lists(st.sampled_from(STEPS), min_size=3, max_size=6), st.booleans())
def test_the_state_after_calls_of_the_net_is_that_after_calls_of_the_model(
    chosen: list[type[nn.Module]], steps: list[str], scheduled: bool
) -> None:
    torch.manual_seed(0)
    check_calls(Stateful(chosen), scheduled, steps)


class Branches(Block):
    """Asks for the value of what it is given, after it has written in place what it keeps."""

    def begin(self) -> None:
        self.seen = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().sum(0)
        return torch.tanh(self.inner(x)) if x.sum() > 0 else self.inner(x)


class Splits(nn.Module):
    """Writes in place what it keeps, and then asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.first, self.last = Branches(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.branch.seen *= 0.5
        return self.last(torch.relu(self.first(x))) + self.branch(x).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_run_that_a_guard_stops_has_not_written_to_attributes(scheduled: bool) -> None:
    torch.manual_seed(0)
    net = check_calls(Splits(), scheduled, ["train"] * 6)
    assert len(net.input_kinds) == 2


class Draws(Block):
    """Draws in Python, so that it is kept whole, and adds to what it keeps."""

    def begin(self) -> None:
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return self.inner(x) if random.random() < 2 else x


class SplitsAfterDraws(nn.Module):
    """Runs what is kept whole, and then asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(WIDTH, WIDTH), Draws(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(torch.relu(self.first(x)))
        return self.last(torch.tanh(y) if y.mean() > y[0].mean() else y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheduled", [False, True])
def test_what_is_kept_whole_has_not_written_in_a_run_that_a_guard_stops(scheduled: bool) -> None:
    torch.manual_seed(0)
    net = check_calls(SplitsAfterDraws(), scheduled, ["train"] * 6)
    assert len(net.input_kinds) == 2


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_branch_on_a_counter_costs_no_forward_pass_ahead(scheduled: bool) -> None:
    """It stands behind the first partition, and is asked before any partition is updated."""
    torch.manual_seed(0)
    net = check_calls(Stateful([AveragesInPlace, WarmsUp]), scheduled, ["train"] * 5)
    assert len(net.input_kinds) == 2
    assert all(each.early_nodes and not each.late_guards for each in net.input_kinds)


class Fills(nn.Module):
    """Counts, and behind the cut compares the number with that of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.met = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.met += 1
        h = torch.relu(self.first(x))
        return self.last(torch.tanh(h) if self.met > x.size(0) else h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_counter_that_is_compared_with_a_size_costs_no_forward_pass_ahead(scheduled: bool) -> None:
    torch.manual_seed(0)
    net = check_calls(Fills(), scheduled, ["train"] * 3 + ["longer"] * 3 + ["train"])
    assert all(each.early_nodes and not each.late_guards for each in net.input_kinds)
