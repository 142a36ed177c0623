"""A model's argument may bear any name, also one that the net, its trainer or their generated code use."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import InputError
from dnifx.estimators import Critic, Oracle

NAMES = ["context", "target", "reset", "diagnose", "kwargs", "mask", "loss", "output", "examples", "features", "torch"]
KINDS = [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY]
X, SHIFT, Y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
OWN = {
    "none": {},
    "context": {"context": "label", "num_classes": 3},
    "foresees": {"context": "label", "num_classes": 3, "gradient": Critic()},
}


class Shifted(nn.Module):
    """Adds an argument of any name to its input before the first layer."""

    def __init__(self, name: str, kind: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        plain = inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([plain, inspect.Parameter(name, kind)])

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs).arguments
            result: Tensor = self.second(torch.relu(self.first(given["x"] + given[name])))
            return result

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def decoupled(name: str, kind: Any, **options: Any) -> dnifx.DecoupledModule:
    """Return a net whose model takes an argument of a name."""
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(reduction="none") if "context" in options else nn.functional.cross_entropy
    return dnifx.decouple(Shifted(name, kind), ["first"], args=(X,), kwargs={name: SHIFT}, loss=loss, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", OWN)
def test_an_argument_of_any_name_reaches_the_model(name: str, kind: Any, own: str) -> None:
    net = decoupled(name, kind, **OWN[own])  # type: ignore[arg-type]
    given = {"context": Y} if own != "none" and name != "context" else {}
    if own == "foresees" and name != "target":
        given["target"] = Y
    told = {"context": Y, "target": Y} if own == "foresees" else {"context": Y} if own == "context" else {}
    expected = net.original(X, **{name: SHIFT})
    assert torch.equal(net(X, kwargs={name: SHIFT}, **told), expected)
    assert torch.equal(net.eval()(X, kwargs={name: SHIFT}, **told), expected)
    if kind is KINDS[0]:
        assert torch.equal(net.train()(X, SHIFT, **told), expected)
    trainer = net.train().trainer(torch.optim.Adam)
    assert torch.equal(trainer.step(X, kwargs={name: SHIFT}, target=Y).output, expected)
    trainer.step(X, kwargs={name: SHIFT}, target=Y, diagnose=True)
    trainer.probe(X, kwargs={name: SHIFT}, target=Y)


@pytest.mark.parametrize("name", NAMES)
def test_steps_train_as_backpropagation_does(name: str) -> None:
    net = decoupled(name, KINDS[1], gradient=Oracle())
    twin = Shifted(name, KINDS[1])
    twin.load_state_dict(net.original.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(X, **{name: SHIFT}), Y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trainer.step(X, kwargs={name: SHIFT}, target=Y)
    for mine, other in zip(net.original.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_context_that_no_estimator_sees_is_the_models() -> None:
    net = decoupled("context", KINDS[1])
    assert torch.equal(net(X, context=SHIFT), net.original(X, context=SHIFT))
    net.trainer(torch.optim.Adam).step(X, context=SHIFT, target=Y)


def test_what_is_missing_or_given_twice_is_told() -> None:
    net = decoupled("target", KINDS[1])
    trainer = net.trainer(torch.optim.Adam)
    with pytest.raises(InputError, match=r"missing .*'target'.*give it as kwargs=\{'target': \.\.\.\}"):
        trainer.step(X, target=Y)
    with pytest.raises(InputError, match="'target' was given twice"):
        net(X, target=SHIFT, kwargs={"target": SHIFT})
    with pytest.raises(InputError, match=r"kwargs= maps the names .* got Tensor"):
        net(X, kwargs=SHIFT)  # type: ignore[arg-type]


class Recurrent(nn.Module):
    """A recurrent model with an input called ``reset`` that is added to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, state: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answer to a window of one step, and the next state."""
        state = torch.tanh(self.cell(torch.cat([x, state + reset], 1)))
        return self.head(state), state


def test_a_recurrent_model_may_have_an_input_called_reset() -> None:
    x, state, reset = torch.randn(2, 4), torch.randn(2, 6), torch.randn(2, 6)
    net = dnifx.decouple(
        Recurrent(),
        dnifx.Recurrent("state", "1"),
        args=(x, state),
        kwargs={"reset": reset},
        loss=lambda output, target: nn.functional.cross_entropy(output, target),
    )
    expected, _ = net.original(x, state, reset)
    assert torch.equal(net(x, state, kwargs={"reset": reset})[0], expected)
    begun = net(x, state, kwargs={"reset": reset}, reset=torch.tensor([True, False]))[0]
    assert torch.equal(begun[1], expected[1])
    assert not torch.equal(begun[0], expected[0])
    net.trainer(torch.optim.Adam).step(x, reset=reset, target=torch.zeros(2, dtype=torch.long))
