"""Values whose first size the data decide (routing, masks) at a boundary: any number of rows trains, none is frozen."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import EstimatorError
from dnifx.passes.insert.routed import data_rows


class Routed(nn.Module):
    """Two experts, whose rows the sign of the first feature decides."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.left, self.right, self.leave = (nn.Linear(6, 6) for _ in range(4))


class ByMask(Routed):
    def forward(self, x: Tensor) -> Tensor:
        h, here = self.enter(x), x[:, 0] > 0
        one, two = torch.tanh(self.left(h[here])), torch.tanh(self.right(h[~here]))
        joined = torch.zeros_like(h).masked_scatter(here[:, None], one).masked_scatter(~here[:, None], two)
        return self.leave(joined)  # type: ignore[no-any-return]


class ByIndex(Routed):
    """Top-1 routing as most people write it."""

    def forward(self, x: Tensor) -> Tensor:
        h, choice = self.enter(x), (x[:, 0] > 0).long()
        joined = torch.zeros_like(h)
        for number, expert in enumerate((self.left, self.right)):
            rows = torch.nonzero(choice == number).squeeze(1)
            joined = joined.index_add(0, rows, torch.tanh(expert(h.index_select(0, rows))))
        return self.leave(joined)  # type: ignore[no-any-return]


class ByWhere(Routed):
    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        joined = h.clone()
        for expert, chosen in ((self.left, x[:, 0] > 0), (self.right, x[:, 0] <= 0)):
            (rows,) = torch.where(chosen)
            joined[rows] = expert(h[rows])
        return self.leave(torch.relu(joined))  # type: ignore[no-any-return]


class Sums(Routed):
    """Each expert's rows end in the loss by themselves."""

    def forward(self, x: Tensor) -> Tensor:
        here = x[:, 0] > 0
        one, two = self.left(self.enter(x[here])), self.right(self.enter(x[~here]))
        return self.leave(torch.relu(one)).sum() + self.leave(torch.relu(two)).sum()  # type: ignore[no-any-return]


KINDS = (ByMask, ByIndex, ByWhere, Sums)
CUTS: dict[type[nn.Module], Any] = {
    ByMask: ["left", "right"],
    ByIndex: ["left"],
    ByWhere: ["left"],
    Sums: ["left", "right"],
}


def batch(positive: int, rows: int = 8) -> Tensor:
    signs = torch.tensor([1.0] * positive + [-1.0] * (rows - positive))
    return signs[:, None] * (torch.rand(rows, 6) + 0.1)


def loss(output: Tensor, target: Any) -> Tensor:
    return output.square().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positive", [4, 8, 3])
def test_any_number_of_rows_trains(kind: type[nn.Module], positive: int) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(kind(), CUTS[kind], args=(batch(positive),), loss=loss)
    assert data_rows(net.program)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1e-5))
    for rows in (4, 5, 1, 8, 0, 7):
        trainer.step(batch(rows), target=None, diagnose=rows == 5)
        net(batch(rows)).square().mean().backward()
    assert all(bool(each.isfinite().all()) for each in net.state_dict().values())
    assert all(each.grad is None or bool(each.grad.isfinite().all()) for each in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_backpropagation_for_any_number_of_rows(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    plain, net = copy.deepcopy(model), dnifx.decouple(model, CUTS[kind], args=(batch(4),), loss=loss, gradient="oracle")
    for rows in (4, 5, 8, 0):
        x = batch(rows)
        for each in (plain, net):
            each.zero_grad()
            loss(each(x), None).backward()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            other = model.get_parameter(name).grad
            assert other is not None
            assert torch.allclose(parameter.grad, other, atol=1e-6), (rows, name)


@pytest.mark.parametrize("kind", [ByMask, ByIndex])
def test_a_label_is_no_context_of_rows_that_are_no_examples(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(kind(), CUTS[kind], args=(batch(8),), context="label", num_classes=3, loss=loss)
    labels = torch.randint(3, (8,))
    for rows in (4, 8, 1):
        loss(net(batch(rows), context=labels), None).backward()


def classified(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize("gradient", ["stale", "sigmoid_linear", "zero"])
def test_estimators_that_take_any_number_of_rows_train(gradient: str) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(ByIndex(), ["left"], args=(batch(4),), gradient=gradient, loss=classified)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    for rows in (4, 5, 8):
        trainer.step(batch(rows), target=torch.randint(6, (8,)))


@pytest.mark.parametrize("gradient", ["critic", "local_loss"])
def test_estimators_of_examples_are_refused_with_the_value_and_its_place(gradient: str) -> None:
    with pytest.raises(EstimatorError, match=r"the data decide the first size of .*nonzero") as caught:
        dnifx.decouple(
            ByIndex(), ["left"], args=(batch(4),), gradient=gradient, loss=classified, context="label", num_classes=6
        )
    assert len(str(caught.value)) < 600


def test_rows_that_are_examples_are_not_taken_for_routed_ones() -> None:
    net = dnifx.decouple(ByIndex(), ["enter"], args=(batch(4),), loss=loss)
    found = data_rows(net.program)
    crossing = {name for boundary in net.boundaries for name in boundary.values}
    assert "enter" in crossing
    assert "enter" not in found
    assert not {name for name in found if name.startswith(("index_add", "leave"))}
