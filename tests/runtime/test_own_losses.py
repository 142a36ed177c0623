"""Terms of the loss that partitions leave on the model: in a trainer the partition that makes one trains it."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import dnifx
from dnifx.errors import LossError

WIDTH = 4


class Experts(nn.Module):
    """Leaves the balance of experts, and a list of penalties; the penalties of later blocks depend on earlier blocks too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.balance: Any = None
        self.penalties: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        self.balance = 3 * shares.mean(0).square().sum()
        self.penalties = [shares.square().mean(), x.abs().mean()]
        return torch.tanh(sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)))  # type: ignore[arg-type]


class Bayesian(nn.Module):
    """Leaves the divergence of its weights, which no input reaches, and activations that no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.kl, self.seen = nn.Parameter(torch.eye(WIDTH)), torch.zeros(()), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.kl = self.mean.square().sum()
        self.seen = x @ self.mean
        return torch.tanh(self.seen)


WEIGHTS = {"*.balance": 0.3, "*.penalties": 0.1, "*.kl": 0.02, "*.seen": None}


def made(kinds: list[type[nn.Module]]) -> Any:
    """Return a model of blocks of some kinds between two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, WIDTH), *(kind() for kind in kinds), nn.Linear(WIDTH, 2)).double()


def own(model: nn.Module) -> dict[str, float | None]:
    """Return the weights that go with a model."""
    names = {name for module in model.modules() for name in vars(module)}
    return {key: weight for key, weight in WEIGHTS.items() if key[2:] in names}


def total(model: nn.Module, weights: dict[str, float | None]) -> Any:
    """Return the sum of all terms that a model holds."""
    found: Any = 0.0
    for module in model.modules():
        for key, weight in weights.items():
            value = getattr(module, key[2:], None)
            if weight is not None and value is not None:
                found = found + weight * (sum(value) if isinstance(value, list) else value)
    return found


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


kinds = st.lists(st.sampled_from((Experts, Bayesian)), min_size=1, max_size=3)


@settings(max_examples=12)
@given(kinds, st.data())
def test_with_the_oracle_own_losses_train_as_terms_of_the_loss_do(chosen: list[type[nn.Module]], data: Any) -> None:
    model = made(chosen)
    plain, weights = copy.deepcopy(model), own(model)
    cuts = data.draw(st.lists(st.sampled_from(range(len(chosen) + 1)), min_size=1, max_size=2, unique=True))
    inputs, target = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    net = dnifx.decouple(model, [str(cut) for cut in cuts], args=(inputs,), gradient="oracle", loss=nn.MSELoss())
    trainer, optimizer = net.trainer(sgd, own_losses=weights), sgd(plain.parameters())
    for step in range(3):
        for each in (trainer.own_losses, weights):
            each.update({name: 0.1 * step for name in each if name == "*.kl"})
        result = trainer.step(inputs, target=target)
        optimizer.zero_grad()
        loss = F.mse_loss(plain(inputs), target) + total(plain, weights)
        loss.backward()
        optimizer.step()
        assert result.loss is not None
        assert torch.allclose(result.loss, loss.detach(), rtol=1e-12)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-13)


def test_a_partition_without_a_synthetic_gradient_learns_from_its_own_loss_alone() -> None:
    model = made([Bayesian])
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    before = model[1].mean.detach().clone()
    net = dnifx.decouple(model, ["1"], args=(x,), gradient="zero", loss=nn.MSELoss())
    result = net.trainer(sgd, own_losses={"1.kl": 0.5, "self.1.seen": None}).step(x, target=y)
    assert torch.allclose(model[1].mean, before - 0.1 * 0.5 * 2 * before)
    assert set(result.losses) == {"loss", "self.1.kl"}
    assert not model[1].kl.requires_grad


def test_a_named_term_is_not_trained_twice_where_the_loss_reads_it_too() -> None:
    model = made([Bayesian])
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    plain = copy.deepcopy(model)
    loss = lambda output, target: F.mse_loss(output, target) + 0.02 * model[1].kl  # noqa: E731
    net = dnifx.decouple(model, ["0"], args=(x,), gradient="oracle", loss=loss)
    net.trainer(sgd, own_losses={"1.kl": 0.02}).step(x, target=y)
    (F.mse_loss(plain(x), y) + 0.02 * plain[1].kl).backward()
    assert torch.allclose(model[1].mean, plain[1].mean - 0.1 * plain[1].mean.grad)


def test_a_probe_knows_own_losses() -> None:
    model = made([Bayesian, Experts])
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    net = dnifx.decouple(model, ["1"], args=(x,), gradient="zero", loss=nn.MSELoss())
    h = torch.tanh(model[0](x) @ model[1].mean).detach().requires_grad_()
    (F.mse_loss(model[3](model[2](h)), y) + 0.3 * model[2].balance).backward()
    norms = []
    for weights in ({"2.balance": 0.3}, {}):
        trainer = net.trainer(sgd, own_losses={"1.kl": 0.1, "1.seen": None, **weights})
        norms.append(trainer.probe(x, target=y).true["1"]["target_norm"])
    assert not torch.equal(*norms)
    assert h.grad is not None


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (
            {"1.kl": 1.0},
            r"forward leaves self.1.seen with a gradient in submod_0.*Give net.trainer\(..., own_losses=\{'1.seen': weight\}\)",
        ),
        ({"1.kl": 1.0, "1.seen": 1.0}, r"names self.1.seen, which is f64\[6, 4\] in submod_0; leave a scalar there"),
        ({"1.kl": 1.0, "*.kl": 1.0, "1.seen": None}, r"names self.1.kl by .*; give it one weight"),
        ({"1.lk": 1.0}, r"names '1.lk', but forward leaves nothing with a gradient there; it leaves some in '1.kl'"),
        ({"1.kl": "0.1", "1.seen": None}, r"'0.1'\}: give a number as the weight"),
    ],
)
def test_what_is_not_named_or_named_wrongly_is_refused_before_the_first_step(weights: Any, says: str) -> None:
    net = dnifx.decouple(
        made([Bayesian]), ["1"], args=(torch.randn(6, 3).double(),), gradient="zero", loss=nn.MSELoss()
    )
    with pytest.raises(LossError, match=says) as error:
        net.trainer(sgd, own_losses=weights)
    assert len(str(error.value)) < 600


def test_an_estimator_that_predicts_the_loss_refuses_own_losses() -> None:
    sees: Any = {"context": "label", "num_classes": 2, "loss": F.cross_entropy}
    net = dnifx.decouple(made([Bayesian]), ["1"], args=(torch.randn(6, 3).double(),), gradient="critic", **sees)
    with pytest.raises(
        LossError, match=r"own_losses= does not go with Critic.*on boundary '1', which predicts the loss"
    ):
        net.trainer(sgd, own_losses={"1.kl": 1.0, "1.seen": None})


class Sometimes(Bayesian):
    """Leaves the divergence when a flag says so."""

    leaves = False

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.mean
        if self.leaves:
            self.kl = h.square().mean()
        return h


def test_a_term_that_only_another_input_kind_leaves_is_refused_when_it_comes() -> None:
    model, x, y = made([Sometimes]), torch.randn(6, 3).double(), torch.randn(6, 2).double()
    trainer = dnifx.decouple(model, ["1"], args=(x,), gradient="zero", loss=nn.MSELoss()).trainer(sgd)
    trainer.step(x, target=y)
    model[1].leaves = True
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(LossError, match=r"forward leaves self.1.kl with a gradient in submod_0"):
        trainer.step(x, target=y)
    assert all(map(torch.equal, before, model.parameters()))
