"""How a captured graph is called: every structure of inputs and outputs, and the errors for wrong ones."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import InputError
from dnifx.passes.capture.record.structure import path_name
from dnifx.passes.capture.signature import CapturedSignature
from dnifx.passes.capture.symbolic import trace_symbolically


class Scaled(nn.Module):
    """Takes a tensor, an optional one, a number and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, power: int = 1, extra: dict[str, Any] | None = None
    ) -> Tensor:
        h = self.first(x)
        h = h if mask is None else h * mask
        for _ in range(power):
            h = torch.tanh(h)
        h = h if extra is None else h + extra["shift"] * extra["pair"][0] - extra["pair"][1]
        result: Tensor = self.second(h)
        return result


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Answers(nn.Module):
    """Returns what it is told to."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        y = self.second(h)
        forms = {
            "one": y,
            "pair": (h, y),
            "list": [y, h],
            "dict": {"y": y, "inner": {"h": h}},
            "named": Pair(h, y),
            "fixed": (y, None, 3),
            "twice": (y, y),
            "input": (x, y),
        }
        return forms[self.form]


class Variadic(nn.Module):
    """Takes any number of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
        h = self.first(torch.stack(parts).sum(0))
        result: Tensor = self.second(h * named["scale"])
        return result


X, MASK = torch.randn(3, 4), torch.rand(3, 4)
EXTRA = {"shift": torch.rand(3, 4), "pair": (torch.rand(3, 4), torch.rand(3, 4))}


def signature(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedSignature:
    return trace_symbolically(model, args, kwargs).signature


@pytest.mark.parametrize(
    ("args", "kwargs", "inputs"),
    [
        ((X,), {}, ("x",)),
        ((), {"x": X}, ("x",)),
        ((X, MASK), {}, ("x", "mask")),
        ((X,), {"mask": MASK, "power": 2}, ("x", "mask")),
        ((X, None), {"power": 3}, ("x",)),
        ((X,), {"extra": EXTRA}, ("x", "extra_shift", "extra_pair_0", "extra_pair_1")),
    ],
)
def test_every_tensor_is_an_input_and_everything_else_is_fixed(
    args: tuple[Any, ...], kwargs: dict[str, Any], inputs: tuple[str, ...]
) -> None:
    model = Scaled()
    assert signature(model, *args, **kwargs).inputs == inputs
    net = dnifx.decouple(model, ["first"], args=args, kwargs=kwargs)
    assert torch.equal(net(*args, **kwargs), model(*args, **kwargs))


def test_position_and_keyword_are_the_same_input() -> None:
    found = signature(Scaled(), X, MASK)
    assert found.flatten((X,), {"mask": MASK}) == (X, MASK)
    assert found.flatten((), {"mask": MASK, "x": X}) == (X, MASK)
    assert all(one is other for one, other in zip(found.flatten((X, MASK), {}), (X, MASK), strict=True))


def test_keys_in_another_order_are_another_input_kind() -> None:
    model = Scaled()
    net = dnifx.decouple(model, ["first"], args=(X,), kwargs={"extra": EXTRA})
    swapped = {"pair": EXTRA["pair"], "shift": EXTRA["shift"]}
    assert torch.equal(net(X, extra=swapped), model(X, extra=swapped))
    assert len(net.input_kinds) == 2
    found = signature(model, X, extra=EXTRA)
    assert found.key((X,), {"extra": swapped}) != found.key((X,), {"extra": EXTRA})


def test_any_number_of_arguments() -> None:
    model = Variadic()
    net = dnifx.decouple(model, ["first"], args=(X, X + 1), kwargs={"scale": MASK})
    assert signature(model, X, X + 1, scale=MASK).inputs == ("parts_0", "parts_1", "scale")
    assert torch.equal(net(X, X + 1, scale=MASK), model(X, X + 1, scale=MASK))
    with pytest.raises(InputError, match="other inputs"):
        signature(model, X, X + 1, scale=MASK).flatten((X, X, X), {"scale": MASK})


@pytest.mark.parametrize("form", ["one", "pair", "list", "dict", "named", "fixed", "twice", "input"])
def test_outputs_come_back_in_their_own_structure(form: str) -> None:
    model = Answers(form)
    net = dnifx.decouple(model, ["first"], args=(X,))
    got, expected = net(X), model(X)
    assert type(got) is type(expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_another_batch_size_is_the_same_structure() -> None:
    model = Scaled()
    net = dnifx.decouple(model, ["first"], args=(X,))
    assert torch.equal(net(torch.ones(7, 4)), model(torch.ones(7, 4)))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (
            (X, MASK),
            {},
            r"(?s)Scaled was captured with other inputs:.*expected mask=.*power=.*2.*got .*mask: tensor.*call it as the example",
        ),
        (
            (),
            {},
            r"Scaled cannot be called with these arguments: missing a required argument: 'x'; its forward takes \(x",
        ),
        ((X,), {"masque": MASK}, "got an unexpected keyword argument 'masque'"),
        (
            (3.0,),
            {"power": 2},
            r"expected x: tensor of 2 dimensions\n +got +x=3.0\ncall it as the example inputs did",
        ),
        ((X,), {"power": 3}, r"expected power=2\n +got +power=3\n.*decouple the model again"),
        ((X,), {"power": torch.tensor(2)}, r"expected power=2\n +got +power: tensor of 0 dimensions"),
        ((X,), {"power": 2.0}, r"expected power=2\n +got +power=2.0"),
    ],
)
def test_a_wrong_call_says_what_was_expected(args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    found = signature(Scaled(), X, power=2)
    with pytest.raises(InputError, match=text):
        found.flatten(args, kwargs)


def test_the_key_of_a_call_is_its_structure_and_its_fixed_values() -> None:
    found = signature(Scaled(), X, power=2)
    assert found.key((X,), {"power": 2}) == found.key((X + 1,), {"power": 2})
    assert found.key((X,), {"power": 2}) != found.key((X,), {"power": 3})
    assert found.key((X, MASK), {"power": 2}) != found.key((X,), {"power": 2})


def test_names_of_leaves_are_identifiers_that_tell_where_they_are() -> None:
    found = signature(Scaled(), X, extra=EXTRA)
    names = [name for name, _ in found.tensors((X,), {"extra": EXTRA})]
    assert names == ["x", "extra_shift", "extra_pair_0", "extra_pair_1"]
    assert all(path_name(leaf.path).isidentifier() for leaf in found.leaves)


def test_a_tensor_given_twice_is_one_input() -> None:
    found = signature(Variadic(), X, X, scale=MASK)
    assert found.inputs == ("parts_0", "scale")
    with pytest.raises(InputError, match="expected parts_1=the same object as parts_0"):
        found.flatten((X, X + 1), {"scale": MASK})


def test_a_copy_is_called_as_the_signature_is() -> None:
    model = Answers("dict")
    copied = copy.deepcopy(signature(model, X))
    assert copied.flatten((X,), {}) == (X,)
    assert copied.unflatten((1, 2)) == {"y": 1, "inner": {"h": 2}}
    assert copied.key((X,), {}) == signature(model, X).key((X,), {})
