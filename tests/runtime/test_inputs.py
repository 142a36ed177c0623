"""Synthetic inputs: what makes them, what they are fitted to, and that evaluation does not use them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx import schedules
from dnifx.errors import EstimatorError
from dnifx.estimators import BPLambda, InputSpec, SyntheticInput
from dnifx.ir import TensorSpec
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.running import TARGETS

VECTOR = TensorSpec((6, 4), torch.float32)
IMAGE = TensorSpec((6, 2, 8, 8), torch.float32)


def spec(inputs: tuple[TensorSpec, ...], values: tuple[TensorSpec, ...], context: int | None = None) -> InputSpec:
    return InputSpec("here", inputs, values, context)


def make_net(gradient: Any = "synthetic", **options: Any) -> tuple[DecoupledModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    given: dict[str, Any] = {"inputs": SyntheticInput(batch_norm=False), "loss": cross_entropy, **options}
    net = dnifx.decouple(model, ["1", "3"], args=(x,), gradient=gradient, **given)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.interface_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return net, x, y


def descend(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def changes(net: DecoupledModule, x: Tensor, y: Tensor, target: str, **context: Any) -> dict[str, Tensor]:
    """The gradients that one step applied, by parameter name."""
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    if target == "scheduled":
        net.trainer(descend).step(x, target=y)
    else:
        torch.autograd.backward(cross_entropy(net(x, **context), y))
        descend(net.parameters()).step()
    return {name: before[name] - parameter.detach() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("target", TARGETS)
def test_partitions_run_on_what_is_imagined_and_learn_from_it(target: str) -> None:
    found = changes(*make_net(), target)
    net, x, y = make_net()
    imagine = [item.input_model for item in net.program.interfaces]
    assert imagine[1] is not None
    (value,) = imagine[1]((x,), None)
    last = net.original.get_submodule("4")
    wanted = torch.autograd.grad(cross_entropy(last(value.detach()), y), list(last.parameters()))
    torch.testing.assert_close(found["4.weight"], wanted[0])
    torch.testing.assert_close(found["4.bias"], wanted[1])


@pytest.mark.parametrize("target", TARGETS)
def test_an_input_model_is_fitted_to_the_value_that_its_producer_made(target: str) -> None:
    found = changes(*make_net(), target)
    net, x, _ = make_net()
    models = [item.input_model for item in net.program.interfaces]
    assert models[0] is not None
    assert models[1] is not None
    made = [net.original[:2](x), net.original[2:4](models[0]((x,), None)[0])]  # type: ignore[index]
    for number, (model, value) in enumerate(zip(models, made, strict=True)):
        assert model is not None
        error = (model((x,), None)[0] - value.detach()).square().sum(1).mean()
        parameters = dict(model.named_parameters())
        for name, wanted in zip(parameters, torch.autograd.grad(error, list(parameters.values())), strict=True):
            key = f"input_models.{net.boundaries[number].key}.{name}"
            torch.testing.assert_close(found[key], wanted)


def test_both_targets_agree_with_labels_too() -> None:
    options: dict[str, Any] = {"context": "label", "num_classes": 3}
    (fused, x, y), (scheduled, _, _) = make_net(**options), make_net(**options)
    one = changes(fused, x, y, "fused", context=y)
    two = changes(scheduled, x, y, "scheduled")
    for name, change in one.items():
        torch.testing.assert_close(change, two[name], rtol=1e-9, atol=1e-11)


def test_evaluation_chains_the_real_partitions() -> None:
    net, x, _ = make_net()
    assert not torch.allclose(net(x), net.original(x))
    with torch.no_grad():
        assert torch.equal(net(x), net.original(x))
    assert torch.equal(net.eval()(x), net.original(x))


def test_no_partition_waits_for_another() -> None:
    net, _, _ = make_net()
    schedule = schedules.sequential(net.program)
    assert schedules.locks(schedule, net.program) == (frozenset(), frozenset(), frozenset())


def test_an_input_model_learns_what_its_boundary_carries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(128, 4), torch.randint(2, (128,))
    net = dnifx.decouple(model, ["1"], args=(x,), gradient="zero", inputs="synthetic", loss=cross_entropy)
    trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    for _ in range(200):
        trainer.step(x, target=y)
    imagine = net.program.interfaces[0].input_model
    assert imagine is not None
    value = model[:2](x)
    assert (imagine((x,), None)[0] - value).square().mean() < 0.1 * value.var()


@pytest.mark.parametrize("hidden", [0, 1, 2])
@pytest.mark.parametrize("context", [None, 3])
def test_it_is_dense_for_vectors_and_convolutional_for_images(hidden: int, context: int | None) -> None:
    label = None if context is None else torch.eye(3)[torch.arange(6) % 3]
    small = TensorSpec((6, 5, 4, 4), torch.float32)
    for inputs, value, kind in ((VECTOR, VECTOR, nn.Linear), (IMAGE, VECTOR, nn.Linear), (IMAGE, small, nn.Conv2d)):
        model = SyntheticInput(hidden=hidden)(spec((inputs,), (value,), context))
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        assert len(layers) == hidden + 1
        assert all(isinstance(layer, kind) for layer in layers)
        (answer,) = model((torch.randn(inputs.shape),), label)
        assert answer.shape == value.shape


def test_it_sees_several_inputs_and_gives_several_values() -> None:
    model = SyntheticInput()(spec((VECTOR, IMAGE), (VECTOR, IMAGE)))
    answer = model((torch.randn(VECTOR.shape), torch.randn(IMAGE.shape)), None)
    assert [tuple(each.shape) for each in answer] == [VECTOR.shape, IMAGE.shape]


def test_it_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(EstimatorError, match="floating-point"):
        SyntheticInput()(spec((TensorSpec((6, 4), torch.int64),), (VECTOR,)))
    with pytest.raises(EstimatorError, match="waits for the true gradient"):
        make_net(BPLambda(0.5))
    with pytest.raises(EstimatorError, match="not there"):
        make_net(inputs={"7": "synthetic"})
