"""The decoupled module as an nn.Module: names, sharing, modes, copies, saving, context."""

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx.errors import ContextError, InputError, LossError
from dnifx.runtime.decoupled import DecoupledModule
from tests.passes.programs import Tied, mlp

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])


class Mixed(nn.Module):
    """Parameters and buffers of the root, a missing child, a child under two names, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.alias = self.first
        self.missing: nn.Module | None = None
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.register_parameter("absent", None)
        self.register_buffer("offset", torch.zeros(6))
        self.register_buffer("scratch", torch.ones(6), persistent=False)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.alias(self.first(x))) * self.scale + self.get_buffer("offset") * self.get_buffer("scratch")
        result: Tensor = self.last(torch.relu(h))
        return result


def decoupled(model: nn.Module | None = None, cuts: Any = ("norm",), **options: Any) -> DecoupledModule:
    return dnifx.decouple(model or Mixed(), list(cuts), args=(X,), loss=F.cross_entropy, **options)


def nudge(net: DecoupledModule) -> None:
    """Let the estimators answer something."""
    with torch.no_grad():
        for parameter in net.interface_parameters():
            parameter.add_(torch.linspace(-0.3, 0.5, parameter.numel()).reshape(parameter.shape).to(parameter.dtype))


def backward(net: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    net.zero_grad()
    torch.autograd.backward(F.cross_entropy(net(x), Y))
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_the_state_has_the_models_own_keys_and_the_interfaces() -> None:
    model = Mixed()
    net = decoupled(model)
    extra = net.state_dict().keys() - model.state_dict().keys()
    assert list(net.state_dict())[: len(model.state_dict())] == list(model.state_dict())
    assert extra
    assert all(key.startswith("interfaces.norm.") for key in extra)
    assert "alias.weight" in net.state_dict()


def test_a_loss_that_is_a_module_adds_nothing_to_the_state() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    net = dnifx.decouple(Mixed(), ["norm"], args=(X,), loss=loss, gradient="zero")
    assert list(net.state_dict()) == list(Mixed().state_dict())
    assert net.loss is loss


def test_parameters_and_buffers_are_shared_not_copied() -> None:
    model = Mixed()
    net = decoupled(model)
    names = dict(net.named_parameters(remove_duplicate=False))
    assert all(names[name] is parameter for name, parameter in model.named_parameters(remove_duplicate=False))
    buffers = dict(net.named_buffers())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    with torch.no_grad():
        model.scale.mul_(3)
    assert torch.equal(net.eval()(X), model(X))


def test_the_interfaces_move_aside_where_the_model_has_a_child_of_that_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.interfaces = nn.Linear(6, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(torch.relu(self.interfaces(x)))
            return result

    model = Named()
    net = decoupled(model, ["interfaces"])
    assert net.interfaces is model.interfaces
    assert torch.equal(net(X), model(X))
    assert {key.partition(".")[0] for key in net.state_dict()} == {"interfaces", "last", "interfaces_"}
    net.trainer(lambda p: torch.optim.SGD(p, lr=0.1)).step(X, target=Y)


def test_a_new_parameter_object_is_seen_by_the_graph() -> None:
    net = decoupled()
    net.scale = nn.Parameter(torch.full((6,), 2.0))
    net.get_submodule("last").weight = nn.Parameter(torch.zeros(3, 6))
    assert net.original.scale is net.scale
    assert len(net.input_kinds) == 1
    assert torch.equal(net(X), net.original(X))
    assert len(net.input_kinds) == 1, "nothing was captured anew"


def test_double_moves_model_interfaces_and_both_targets() -> None:
    net = decoupled().double()
    assert {tensor.dtype for tensor in net.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    nudge(net)
    assert net(X.double()).dtype == torch.float64
    assert torch.equal(net.eval()(X.double()), net.original(X.double()))
    net.train()
    result = net.trainer(lambda p: torch.optim.SGD(p, lr=0.1)).step(X.double(), target=Y)
    assert result.loss is not None
    assert result.loss.dtype == torch.float64


def test_to_meta_and_back_keeps_one_set_of_tensors() -> None:
    net = decoupled()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net.to("meta").to_empty(device="cpu").load_state_dict(state)
    with torch.no_grad():
        net.get_buffer("scratch").fill_(1)
    assert torch.equal(net.eval()(X), net.original(X))
    assert torch.equal(net(X), decoupled().eval()(X))


def test_training_mode_is_the_originals_too() -> None:
    net = decoupled()
    for mode in (False, True):
        assert net.train(mode) is net
        assert (net.training, net.original.training, net.get_submodule("norm").training) == (mode, mode, mode)
    model = Mixed().eval()
    assert not decoupled(model).training


def test_batch_statistics_are_updated_once_a_forward() -> None:
    net, model = decoupled(), Mixed()
    for _ in range(3):
        net(X)
        model(X)
    assert all(torch.equal(one, other) for one, other in zip(net.original.buffers(), model.buffers(), strict=True))


def test_evaluation_and_training_outputs_are_the_originals() -> None:
    net, model = decoupled(), Mixed()
    assert torch.equal(net(X), model(X))
    assert torch.equal(net.eval()(X), model.eval()(X))
    with torch.no_grad():
        assert torch.equal(net(X), model(X))
    with torch.inference_mode():
        assert torch.equal(net(X), model(X))


def test_under_no_grad_the_original_runs_and_no_estimator_is_asked() -> None:
    net = decoupled()
    asked: list[object] = []
    net.program.interfaces[0].estimator.register_forward_pre_hook(lambda module, args: asked.append(module))
    with torch.no_grad():
        net(X)
    assert asked == []
    net(X)
    assert len(asked) == 1


def test_a_copy_is_whole_and_apart() -> None:
    net = decoupled()
    nudge(net)
    expected = backward(net)
    twin = copy.deepcopy(net)
    assert twin.original is twin.program.model
    assert twin.original is not net.original
    assert twin.get_submodule("interfaces.norm") is twin.program.interfaces[0].estimator
    mine = {id(tensor) for tensor in net.state_dict(keep_vars=True).values()}
    assert not mine & {id(tensor) for tensor in twin.state_dict(keep_vars=True).values()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert backward(twin).keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in backward(twin).items())


def test_a_copy_goes_on_as_a_module_of_its_own() -> None:
    twin = copy.deepcopy(decoupled()).double()
    assert twin(X.double()).dtype == torch.float64
    twin.load_state_dict({name: torch.zeros_like(value) for name, value in twin.state_dict().items()})
    assert not twin(X.double()).any()
    twin.eval()
    assert not twin.original.training
    twin.train()
    result = twin.trainer(lambda p: torch.optim.SGD(p, lr=0.1)).step(X.double(), target=Y)
    assert result.loss is not None


def test_tied_weights_stay_tied_in_a_copy() -> None:
    twin = copy.deepcopy(decoupled(Tied(), ["first"]))
    weight = twin.get_parameter("first.weight")
    assert weight is twin.get_parameter("second.weight")
    assert weight is twin.original.get_parameter("first.weight")


def test_the_state_is_saved_and_loaded_with_weights_only() -> None:
    net, other = decoupled(), decoupled()
    nudge(net)
    net(X)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    one, two = backward(net), backward(other)
    assert all(torch.equal(gradient, two[name]) for name, gradient in one.items())


def test_the_originals_checkpoint_loads_and_the_decoupled_one_loads_into_the_original() -> None:
    net, model = decoupled(), Mixed()
    model.load_state_dict({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()})
    missing, unexpected = net.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("interfaces.") for name in missing)
    own = OrderedDict((name, value) for name, value in net.state_dict().items() if not name.startswith("interfaces."))
    Mixed().load_state_dict(own)
    assert torch.equal(net.eval()(X), model.eval()(X))


def test_assigned_tensors_are_seen_by_the_graph() -> None:
    net = decoupled()
    state = {name: torch.full_like(value, 0.25) for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    assert torch.equal(net(X), net.original(X))
    assert len(net.input_kinds) == 1, "nothing was captured anew"
    assert net.original.get_parameter("scale")[0] == 0.25


def test_a_context_is_demanded_where_there_is_one() -> None:
    net = decoupled(context="label", num_classes=3)
    with pytest.raises(
        ContextError, match=r"see a context \(label \(3 classes\)\); call it as net\(x, context=...\), or under"
    ):
        net(X)
    assert torch.equal(net.eval()(X, context=Y), net.original(X))
    with torch.no_grad():
        assert torch.equal(net(X), net.original(X))


def test_a_context_that_nobody_sees_is_refused() -> None:
    with pytest.raises(dnifx.DnifxError, match="context"):
        decoupled()(X, context=Y)
    trainer = decoupled().trainer(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ContextError, match="the estimators of this module see none; decouple it with context="):
        trainer.step(X, target=Y, context=Y)


def test_a_context_changes_the_estimates_and_not_the_output() -> None:
    net = decoupled(context="label", num_classes=3)
    nudge(net)
    net.eval()
    gradients = []
    for context in (Y, (Y + 1) % 3):
        net.zero_grad()
        output = net(X, context=context)
        assert torch.equal(output, net.original(X))
        torch.autograd.backward(F.cross_entropy(output, Y))
        weight = net.get_parameter("first.weight").grad
        assert weight is not None
        gradients.append(weight.clone())
    assert not torch.equal(*gradients)


def test_no_trainer_without_a_loss() -> None:
    net = dnifx.decouple(Mixed(), ["norm"], args=(X,))
    with pytest.raises(LossError, match=r"a trainer needs a loss: give dnifx.decouple\(..., loss=...\) a callable"):
        net.trainer(lambda p: torch.optim.SGD(p, lr=0.1))


def test_it_prints_its_partitions() -> None:
    text = str(decoupled())
    assert "submod_0" in text
    assert "norm" in text
    assert "Linear" in repr(decoupled()), "and as a module it lists its children"


def test_another_batch_size_and_the_gradients_of_the_inputs() -> None:
    net = decoupled(gradient="oracle").double()
    model = Mixed().double()
    x = torch.randn(9, 6).double().requires_grad_()
    (got,) = torch.autograd.grad(net(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_hooks_of_the_models_layers_run() -> None:
    model = mlp(6, 6, 3)
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    net = decoupled(model, ["1"])
    seen.clear()
    net(X)
    assert seen == [(4, 6)]


class Auxiliary(nn.Module):
    """In training it also gives what a second head makes of the first layer, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.aside = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = torch.relu(self.first(x))
        result: Tensor = self.last(torch.relu(self.middle(h)))
        return (result, self.aside(h)) if self.training else result


def test_evaluation_runs_the_model_itself_where_other_values_cross_than_in_training() -> None:
    model = Auxiliary()
    net = dnifx.decouple(model, ["middle"], args=(X,), gradient="zero")
    assert len(net.boundaries[0].values) == 2
    net.eval()
    with pytest.warns(UserWarning, match="in this mode Auxiliary runs without its interfaces"):
        found = net(X)
    torch.autograd.backward(F.cross_entropy(found, Y))
    assert torch.equal(found, model(X))
    assert model.first.weight.grad is not None
    assert torch.equal(net(X), found), "told once"
    net.train()
    assert isinstance(net(X), tuple)
    assert len(net.input_kinds) == 1


def test_training_on_other_values_than_those_of_evaluation_is_refused() -> None:
    net = dnifx.decouple(Auxiliary().eval(), ["middle"], args=(X,), gradient="zero")
    net.train()
    with pytest.raises(InputError, match="decouple the model again with an example of this call"):
        net(X)


class Counting(nn.Sequential):
    """Keeps a count beside its parameters."""

    count = 0

    def get_extra_state(self) -> int:
        """Return the count."""
        return self.count

    def set_extra_state(self, state: int) -> None:
        """Put the count back."""
        self.count = state


def test_the_extra_state_of_the_model_is_saved_and_loaded() -> None:
    nets = [
        dnifx.decouple(Counting(nn.Linear(3, 3), nn.Linear(3, 2)), ["0"], args=(torch.randn(2, 3),)) for _ in range(2)
    ]
    nets[0].original.set_extra_state(5)
    state = nets[0].state_dict()
    assert set(nets[0].original.state_dict()) <= set(state)
    assert nets[1].load_state_dict(state).missing_keys == []
    assert nets[1].original.get_extra_state() == 5
    whole = nn.ModuleDict({"net": nets[1]})
    assert whole.state_dict()["net._extra_state"] == 5
    whole.load_state_dict({**whole.state_dict(), "net._extra_state": 7})
    assert nets[1].original.get_extra_state() == 7
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"_extra_state"'):
        nets[1].load_state_dict(state)
    plain = dnifx.decouple(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), ["0"], args=(torch.randn(2, 3),))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"_extra_state"'):
        plain.load_state_dict({**plain.state_dict(), "_extra_state": 1})
