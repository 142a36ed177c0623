"""``gradient="auto"``: what is chosen for each boundary, and that the report says why."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.estimators import Auto, Suffix, Synthetic
from dnifx.report.facts import as_dict

X, Y = torch.randn(6, 5), torch.arange(6) % 3
HINT = "the loss is known: gradient='auto'"


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class WithLoss(nn.Module):
    """Returns its loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return cross_entropy(logits, y), logits


class Stepped(nn.Module):
    """A cell behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(5, 4), nn.GRUCell(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(torch.relu(self.first(x)), state)
        return self.last(state), state


def chosen(net: dnifx.DecoupledModule) -> dict[str, str]:
    """The estimator of each boundary, as the machine-readable report names it."""
    return {each["name"]: each["estimator"] for each in json.loads(json.dumps(as_dict(net.program)))["boundaries"]}


def test_a_loss_that_is_known_makes_suffixes_and_trains() -> None:
    net = dnifx.decouple(dense(), ["1", "3"], args=(X,), gradient="auto", loss=cross_entropy)
    assert chosen(net) == {"1": "Suffix(blocks=1)", "3": "Suffix(blocks=1)"}
    text = " ".join(str(net).split())
    assert "auto chose Suffix(blocks=1) for '1': the loss is known; the suffix of '1' keeps" in text
    assert HINT not in text
    reasons = [each["reason"] for each in as_dict(net.program)["boundaries"]]
    assert all(each.startswith("auto chose Suffix(blocks=1)") for each in reasons)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    first = trainer.step(X, target=Y).loss
    for _ in range(20):
        last = trainer.step(X, target=Y).loss
    assert last is not None
    assert first is not None
    assert last < first
    torch.autograd.backward(cross_entropy(net(X[:4], target=Y[:4]), Y[:4]))


def test_a_model_that_returns_its_loss_needs_no_other() -> None:
    net = dnifx.decouple(WithLoss(), "net.1", args=(X, Y), gradient="auto")
    assert chosen(net) == {"net.1": "Suffix(blocks=1)"}
    torch.autograd.backward(net(X, Y)[0])


def test_where_no_loss_is_known_it_says_what_it_lacks() -> None:
    net = dnifx.decouple(dense(), ["1"], args=(X,), gradient="auto")
    assert chosen(net) == {"1": "Affine(budget=0.25)"}
    (note,) = [each for each in net.program.notes if "auto" in each]
    assert note.startswith(
        "auto chose Affine(budget=0.25) for '1': a suffix gives the gradient of the loss, and none is known"
    )
    assert "loss=" in note


def refused(*given: Any) -> Any:
    raise dnifx.errors.EstimatorError("boundary '1': no suffix today")


def test_a_suffix_that_cannot_be_made_gives_way_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnifx.passes.insert.interfaces.suffix_interface", refused)
    net = dnifx.decouple(dense(), ["1"], args=(X,), gradient="auto", loss=cross_entropy)
    assert "auto chose Affine(budget=0.25) for '1': no suffix today" in net.program.notes
    net.trainer(torch.optim.Adam).step(X, target=Y)


def test_a_model_that_is_cut_in_time_has_synthetic_gradients() -> None:
    model, state = Stepped(), torch.zeros(6, 4)
    cuts: list[Any] = [dnifx.Recurrent("state", "1"), "first"]
    net = dnifx.decouple(
        model, cuts, args=(X, state), gradient="auto", loss=lambda output, y: cross_entropy(output[0], y)
    )
    assert chosen(net) == {"first": "Affine(budget=0.25)"}
    text = " ".join(str(net).split())
    assert "auto chose Affine(budget=0.25) for 'first': a suffix sees one window alone" in text
    assert "estimator SyntheticState(hidden=1)" in text


def test_each_boundary_is_chosen_for_by_itself_and_options_are_passed_on() -> None:
    gradient: dict[str, Any] = {"1": Auto(Suffix(blocks=0)), "3": "zero"}
    net = dnifx.decouple(dense(), ["1", "3"], args=(X,), gradient=gradient, loss=cross_entropy)
    assert chosen(net) == {"1": "Suffix(blocks=0)", "3": "Zero()"}
    plain = dnifx.decouple(dense(), ["1"], args=(X,), gradient=Auto(otherwise=Synthetic(hidden=0)))
    assert chosen(plain) == {"1": "Synthetic(hidden=0)"}


def test_another_kind_of_inputs_keeps_what_was_chosen() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = dense()

        def forward(self, x: Tensor, double: bool = False) -> Tensor:
            answer: Tensor = self.net(2 * x if double else x)
            return answer

    for loss in (cross_entropy, None):
        net = dnifx.decouple(Switch(), "net.1", args=(X,), gradient="auto", loss=loss)
        given: dict[str, Any] = {} if loss is None else {"target": Y}
        torch.autograd.backward(cross_entropy(net(X, double=True, **given), Y))
        assert len(net.input_kinds) == 2
        assert sum("auto chose" in note for note in net.program.notes) == 1


def test_the_default_points_to_it_where_a_loss_is_known() -> None:
    told = dnifx.decouple(dense(), ["1"], args=(X,), loss=cross_entropy)
    assert any(note.startswith(HINT) for note in told.program.notes)
    silent = [
        dnifx.decouple(dense(), ["1"], args=(X,)),
        dnifx.decouple(dense(), ["1"], args=(X,), loss=cross_entropy, gradient="zero"),
        dnifx.decouple(dense(), ["1"], args=(X,), loss=cross_entropy, gradient=Synthetic()),
    ]
    assert not any(HINT in note for net in silent for note in net.program.notes)
