"""The net in place of the model: signature, attributes, methods and states are the model's."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.runtime.decoupled import DecoupledModule

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Has what models of libraries have: a configuration, other methods, tied weights, class attributes, properties."""

    _tied_weights_keys = ("leave.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 6)
        self.leave.weight = self.enter.weight
        self.config = {"width": 6}
        self.scale = 1.0

    @property
    def device(self) -> torch.device:
        return self.enter.weight.device

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.enter(x))

    def forward(self, x: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.leave(self.encode(x)) * self.scale
        return found

    def __deepcopy__(self, memo: Any) -> "Model":
        """Copy by hand, as some models do; a copy of the net must not take this way."""
        made = Model()
        memo[id(self)] = made
        made.load_state_dict(self.state_dict())
        return made


class Free(nn.Module):
    """Takes anything."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, self_: Tensor, **more: Any) -> Tensor:
        found: Tensor = self.leave(torch.relu(self.enter(self_)))
        return found


def make(model: nn.Module, **options: Any) -> DecoupledModule:
    return dnifx.decouple(model, ["enter"], args=(X,), loss=nn.functional.mse_loss, **options)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch's own, where it reads an exported graph
@pytest.mark.parametrize("model", [Model, Free])
@pytest.mark.parametrize("copies", [lambda net: net, copy.copy, lambda net: pickle.loads(pickle.dumps(net))])
def test_the_signature_is_the_models(model: type[nn.Module], copies: Any) -> None:
    net = copies(make(model()))
    assert inspect.signature(net.forward) == inspect.signature(net.original.forward)
    assert "Run the model." in str(net.forward.__doc__)
    assert torch.equal(net(X), net.original(X))


def test_what_the_net_takes_itself_is_shown_beside() -> None:
    net = make(Model(), context="label", num_classes=3)
    assert list(inspect.signature(net.forward).parameters) == ["x", "labels", "mask", "context"]
    assert list(inspect.signature(make(Free(), context="label", num_classes=3).forward).parameters) == [
        "self_",
        "context",
        "more",
    ]


def test_attributes_and_methods_of_the_model_are_reached() -> None:
    net = make(Model())
    original: Any = net.original
    assert net.config is original.config
    assert net.device == torch.device("cpu")
    assert net._tied_weights_keys == ("leave.weight",)
    assert torch.equal(net.encode(X), original.encode(X))


def test_the_nets_own_names_are_not_hidden() -> None:
    class Named(Model):
        loss, code, program, trainer, step = "mine", 1, 2, 3, 4

    net = make(Named())
    assert callable(net.trainer)
    assert isinstance(net.program, dnifx.ir.Program)
    assert net.loss is nn.functional.mse_loss
    assert net.step == 4
    assert getattr(net.original, "loss") == "mine"  # noqa: B009


def test_an_attribute_that_nobody_has_is_told_with_both() -> None:
    net = make(Model())
    with pytest.raises(AttributeError, match=r"neither the net nor its model \(net.original, Model\) has .* 'decode'"):
        net.decode  # noqa: B018
    assert not hasattr(net, "__len__")
    assert not hasattr(net, "__wrapped__")


def test_an_attribute_that_forward_reads_is_set_on_the_model() -> None:
    net = make(Model())
    before = net(X)
    net.scale = 3.0
    assert net.original.scale == 3.0
    torch.testing.assert_close(net(X), 3 * before)
    net.note = "of the net"
    assert not hasattr(net.original, "note")


def test_the_state_of_the_model_alone_loads_into_a_plain_copy() -> None:
    net = make(Model())
    net.trainer(torch.optim.Adam).step(X, target=X)
    plain = Model()
    plain.load_state_dict(net.original_state_dict())
    assert torch.equal(plain(X), net.original(X))
    assert set(net.original_state_dict()) < set(net.state_dict())


def test_a_copy_of_the_net_is_a_net() -> None:
    net = make(Model())
    again = copy.deepcopy(net)
    assert isinstance(again, DecoupledModule)
    assert getattr(again.forward, "__self__") is again  # noqa: B009
    assert torch.equal(again(X), net(X))
