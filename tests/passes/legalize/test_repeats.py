"""Repeats: each partition computes for itself what depends on parameters alone, without an interface."""

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import LegalizeError
from dnifx.passes.legalize.legalize import Legalize
from tests.passes.programs import compiled

X = torch.randn(3, 4)
Loss = tuple[Tensor, Tensor]


class Shared(nn.Module):
    """Reads views of two parameters, one by a size of the input, on both sides of ``middle``, and returns one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)
        self.weight, self.place = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turned, place, fixed = self.weight.t(), self.place[: x.shape[0]], self.weight.detach()
        h = self.middle(self.first(x) @ turned + place + fixed.sum())
        return (self.last(h) @ turned + place) @ fixed, self.weight


class Spent(nn.Module):
    """Writes in place to a view of a parameter, and reads it behind the cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        held = self.weight.detach().t()
        h = self.middle(self.first(x) @ held.mul_(0.5))
        result: Tensor = self.last(h) @ held + self.weight.sum()
        return result


def loss(output: Loss, target: Tensor) -> Tensor:
    return (output[0] - target).square().mean() + output[1].square().sum() * 0.1


def backprop(steps: int) -> list[float]:
    model, found = Shared(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(X), X)
        torch.autograd.backward(value)
        optimizer.step()
        found.append(float(value.detach()))
    return found


def test_views_of_parameters_take_no_interface_and_learn_from_all_their_readers() -> None:
    net = dnifx.decouple(Shared(), ["middle"], args=(X,), gradient="oracle", loss=loss)
    assert [boundary.values for boundary in net.boundaries] == [("middle",)]
    assert {"weight", "place"} <= set(net.partitions[1].parameters)
    assert {"weight", "place"} <= set(net.partitions[0].uses)
    assert any("computes it from its parameters" in note for note in net.program.notes)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    losses = [trainer.step(X, target=X).loss for _ in range(3)]
    assert [None if each is None else float(each) for each in losses] == pytest.approx(backprop(3), rel=1e-5)


def test_both_targets_train_alike_where_views_of_parameters_are_read_on_both_sides() -> None:
    states = []
    for scheduled in (True, False):
        net = dnifx.decouple(Shared(), ["middle"], args=(X,), gradient="zero", loss=loss)
        optimizer = torch.optim.SGD(net.original.parameters(), lr=0.1)
        trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        for _ in range(3):
            if scheduled:
                trainer.step(X, target=X)
            else:
                optimizer.zero_grad()
                torch.autograd.backward(loss(net(X), X))
                optimizer.step()
        states.append(net.original.state_dict())
    assert all(torch.allclose(states[0][name], states[1][name]) for name in states[0])


def test_the_first_program_is_left_as_it_was() -> None:
    program = compiled(Shared(), ["middle"], X, until="partition")
    before = str(program.graph), dict(program.partition_of)
    legal = Legalize().run(program)
    assert (str(program.graph), dict(program.partition_of)) == before
    assert set(legal.measures) | {"output"} >= set(legal.partition_of)


def test_another_input_kind_finds_its_partitions_among_repeated_nodes() -> None:
    net = dnifx.decouple(Shared(), ["middle"], args=(X,), gradient="zero", loss=loss)
    net.eval()
    other = net(X)[0]
    assert len(net.input_kinds) == 2
    assert torch.equal(other, net.original(X)[0])
    assert net.input_kinds[1].program.boundaries == net.input_kinds[0].program.boundaries


def test_a_view_of_a_parameter_that_is_written_to_is_refused() -> None:
    with pytest.raises(LegalizeError, match=r"shares the memory of a trainable parameter"):
        dnifx.decouple(Spent(), ["middle"], args=(X,), gradient="zero")
