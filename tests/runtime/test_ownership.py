"""Parameters that the example does not use: the input kind that trains them first decides which partition updates them."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import InputError, StateError
from dnifx.runtime.decoupled import DecoupledModule

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.tensor([[True, False, True, False]]).T
Y = torch.tensor([0, 1, 1, 0])
LOSS = nn.CrossEntropyLoss()


class Optional(nn.Module):
    """Takes another layer, on either side of the cut, where there is a mask."""

    def __init__(self, plain_body: bool = False) -> None:
        super().__init__()
        self.body = nn.Tanh() if plain_body else nn.Linear(3, 3)
        self.early, self.late, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return scores."""
        if mask is not None:
            x = self.early(x) * mask
        h = self.body(x)
        if mask is not None:
            h = h + torch.tanh(self.late(h))
        scores: Tensor = self.last(torch.tanh(self.head(h)))
        return scores


def made(gradient: str = "oracle") -> DecoupledModule:
    torch.manual_seed(0)
    return dnifx.decouple(Optional().double(), ["body", "head"], args=(X,), gradient=gradient, loss=LOSS)


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)  # type: ignore[arg-type]


def test_a_run_over_several_input_kinds_is_that_of_one_optimizer_over_all_parameters() -> None:
    net = made()
    model = copy.deepcopy(net.original)
    trainer, plain = net.trainer(adam), adam(model.parameters())
    for mask in (None, MASK, None, MASK):
        plain.zero_grad()
        LOSS(model(X, mask), Y).backward()
        plain.step()
        trainer.step(X, mask, target=Y)
    for (name, one), other in zip(model.named_parameters(), net.original.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14), name
    taken = [name for names in trainer.parts[0].ownership.adopted.values() for name in names]
    assert sorted(taken) == ["early.bias", "early.weight", "late.bias", "late.weight"]
    assert {"early.weight", "early.bias"} <= set(trainer.parts[0].ownership.adopted["submod_0"])


def test_learning_rates_hold_for_what_was_taken_in() -> None:
    net = made()
    trainer = net.trainer(
        lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0),
    )
    trainer.step(X, target=Y)
    before = net.original.get_parameter("late.weight").clone()
    trainer.step(X, MASK, target=Y)
    assert torch.equal(net.original.get_parameter("late.weight"), before)
    assert all(len(optimizer.param_groups) == 1 for optimizer in trainer.optimizers.values())


def test_a_saved_run_goes_on_bit_for_bit_where_the_new_one_meets_other_inputs_first() -> None:
    net = made("synthetic")
    trainer = net.trainer(adam)
    for mask in (None, MASK):
        trainer.step(X, mask, target=Y)
    state = copy.deepcopy(trainer.state_dict())
    other = made("synthetic")
    again = other.trainer(adam)
    again.load_state_dict(state)
    for mask in (None, MASK, None):
        losses = [each.step(X, mask, target=Y).loss for each in (trainer, again)]
        assert torch.equal(losses[0], losses[1])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_state_that_knows_less_than_the_trainer_is_refused() -> None:
    fresh, trainer = made().trainer(adam), made().trainer(adam)
    trainer.step(X, MASK, target=Y)
    with pytest.raises(StateError, match=r"early\.weight.*load the state into a new trainer"):
        trainer.load_state_dict(fresh.state_dict())


def test_what_a_refused_state_had_taken_in_is_taken_in_again_later() -> None:
    saved, trainer, plain = made().trainer(adam), made().trainer(adam), made().trainer(adam)
    saved.step(X, MASK, target=Y)
    state = copy.deepcopy(saved.state_dict())
    state["optimizers"]["submod_1"]["state"] = "damaged"
    with pytest.raises(StateError):
        trainer.load_state_dict(state)
    for mask in (MASK, None, MASK):
        trainer.step(X, mask, target=Y)
        plain.step(X, mask, target=Y)
    pairs = zip(trainer.net.parameters(), plain.net.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert trainer.parts[0].ownership.adopted == plain.parts[0].ownership.adopted


def test_a_partition_without_an_optimizer_takes_nothing_in() -> None:
    model = Optional(plain_body=True).double()
    net = dnifx.decouple(model, ["body", "head"], args=(X.clone().requires_grad_(),), gradient="zero", loss=LOSS)
    trainer = net.trainer(adam)
    assert "submod_0" not in trainer.optimizers
    with pytest.raises(InputError, match=r"submod_0 also trains early\.weight, early\.bias.*, but it has no optimizer"):
        trainer.step(X.clone().requires_grad_(), MASK, target=Y)
    assert all(parameter.grad is None for parameter in model.parameters())
