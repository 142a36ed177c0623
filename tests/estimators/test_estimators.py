"""The built-in estimators: shapes, the first answer, context, several values, and each one's defining property."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx import estimators
from dnifx.errors import EstimatorError
from dnifx.estimators import BoundarySpec, Oracle, Stale, Synthetic, Zero
from dnifx.ir import TensorSpec
from tests.passes.programs import mlp

VECTOR, IMAGE, TOKENS = (4, 6), (4, 3, 5, 5), (4, 7, 6)


def spec(*shapes: tuple[int, ...], context: int | None = None, **options: Any) -> BoundarySpec:
    return BoundarySpec("cut", tuple(TensorSpec(shape, torch.float32, True) for shape in shapes), context, **options)


def values(*shapes: tuple[int, ...], batch: int = 4) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, *shape[1:]) for shape in shapes)


def layers(estimator: nn.Module) -> list[str]:
    return [type(module).__name__ for module in estimator.modules() if not list(module.children())]


@pytest.mark.parametrize("shape", [VECTOR, IMAGE, TOKENS])
@pytest.mark.parametrize("hidden", [0, 1, 2])
@pytest.mark.parametrize("context", [None, 10])
def test_a_synthetic_gradient_has_its_values_shape_and_starts_at_exactly_zero(
    shape: tuple[int, ...], hidden: int, context: int | None
) -> None:
    estimator = Synthetic(hidden=hidden)(spec(shape, context=context))
    for batch in (2, 4):
        label = None if context is None else F.one_hot(torch.arange(batch), 10).float()
        (answer,) = estimator(values(shape, batch=batch), label)
        assert answer.shape == (batch, *shape[1:])
        assert torch.equal(answer, torch.zeros_like(answer))
        assert answer.requires_grad


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (VECTOR, ["Linear", "BatchNorm1d", "ReLU", "Linear"]),
        (IMAGE, ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]),
        (TOKENS, ["Linear", "ReLU", "Linear"]),
    ],
)
def test_the_network_follows_the_shape(shape: tuple[int, ...], expected: list[str]) -> None:
    assert layers(Synthetic(hidden=1)(spec(shape))) == expected
    without = [layer for layer in expected if not layer.startswith("BatchNorm")]
    assert layers(Synthetic(hidden=1, batch_norm=False)(spec(shape))) == without
    assert layers(Synthetic(hidden=0)(spec(shape))) == expected[-1:]


def test_width_kernel_and_sizes() -> None:
    dense = Synthetic(hidden=2, width=9)(spec(VECTOR, context=10))
    assert [tuple(p.shape) for name, p in dense.named_parameters() if p.dim() == 2] == [(9, 16), (9, 9), (6, 9)]
    image = Synthetic(hidden=1, width=8, kernel=3)(spec(IMAGE, context=10))
    assert [tuple(p.shape) for p in image.parameters() if p.dim() == 4] == [(8, 13, 3, 3), (3, 8, 3, 3)]
    own = Synthetic(hidden=1)(spec(VECTOR))
    assert [tuple(p.shape) for p in own.parameters() if p.dim() == 2] == [(6, 6), (6, 6)]


def test_the_last_layer_alone_is_zero_in_weight_and_bias() -> None:
    networks = Synthetic(hidden=1)(spec(VECTOR))
    linear = [module for module in networks.modules() if isinstance(module, nn.Linear)]
    assert linear[0].weight.abs().min() > 0
    assert torch.count_nonzero(linear[-1].weight) == torch.count_nonzero(linear[-1].bias) == 0


def test_a_label_is_concatenated_to_a_vector() -> None:
    estimator = Synthetic(hidden=0)(spec(VECTOR, context=3))
    (weight,) = (p for p in estimator.parameters() if p.dim() == 2)
    weight.data[:, 6:] = torch.tensor([1.0, 2.0, 4.0])
    label = F.one_hot(torch.tensor([0, 1, 2, 2]), 3)
    assert estimator(values(VECTOR), label)[0].tolist() == [[1.0] * 6, [2.0] * 6, [4.0] * 6, [4.0] * 6]


def test_a_label_is_constant_channels_of_an_image() -> None:
    estimator = Synthetic(hidden=0, kernel=1)(spec(IMAGE, context=3))
    (weight,) = (p for p in estimator.parameters() if p.dim() == 4)
    weight.data[:, 3:, 0, 0] = torch.tensor([1.0, 2.0, 4.0])
    label = F.one_hot(torch.tensor([0, 1, 2, 2]), 3)
    answer = estimator(values(IMAGE), label)[0]
    assert [example.unique().tolist() for example in answer] == [[1.0], [2.0], [4.0], [4.0]]


def test_a_label_is_seen_by_every_token_and_a_label_a_token_by_its_own() -> None:
    label = F.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
    one = Synthetic(hidden=0)(spec(TOKENS, context=3))
    each = Synthetic(hidden=0)(spec(TOKENS, context=3))
    for estimator in (one, each):
        (weight,) = (p for p in estimator.parameters() if p.dim() == 2)
        weight.data[:, 6:] = torch.tensor([1.0, 2.0, 4.0])
    assert one(values(TOKENS), label)[0][:, :, 0].tolist() == [[v] * 7 for v in (1.0, 2.0, 4.0, 4.0)]
    per_token = F.one_hot(torch.arange(28).reshape(4, 7) % 3, 3)
    assert each(values(TOKENS), per_token)[0][0, :, 0].tolist() == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0]


def test_tokens_are_predicted_one_by_one() -> None:
    estimator = Synthetic(hidden=1)(spec(TOKENS)).eval()
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    (x,) = values(TOKENS)
    whole = estimator((x,))[0]
    torch.testing.assert_close(estimator((x[:, 2:4],))[0], whole[:, 2:4])


def test_several_values_of_one_kind_are_predicted_together() -> None:
    estimator = Synthetic(hidden=1)(spec((4, 6), (4, 2)))
    assert [tuple(p.shape) for p in estimator.parameters() if p.dim() == 2] == [(8, 8), (8, 8)]
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    first, second = values((4, 6), (4, 2))
    answers = estimator((first, second))
    assert [answer.shape for answer in answers] == [(4, 6), (4, 2)]
    assert not torch.equal(estimator((first, second + 1))[0], answers[0]), "each sees the other"


def test_values_of_unlike_kinds_have_networks_of_their_own_and_keep_their_order() -> None:
    shapes = (IMAGE, VECTOR, TOKENS, (4, 2), (4, 3, 2, 2), (4, 8, 5, 5))
    estimator = Synthetic(hidden=0)(spec(*shapes, context=3))
    label = F.one_hot(torch.tensor([0, 1, 2, 2]), 3)
    answers = estimator(values(*shapes), label)
    assert [tuple(answer.shape) for answer in answers] == list(shapes)
    assert len(estimator.get_submodule("networks")._modules) == 4


@pytest.mark.parametrize("options", [{"hidden": -1}, {"width": 0}, {"kernel": 4}, {"kernel": 0}])
def test_options_that_make_no_network(options: dict[str, Any]) -> None:
    with pytest.raises(EstimatorError, match="hidden must be 0 or more, width positive and kernel odd"):
        Synthetic(**options)


def test_values_that_it_does_not_take() -> None:
    text = r"boundary 'cut': value 0 is complex64\[4, 2\]; a synthetic gradient needs real floating point"
    with pytest.raises(EstimatorError, match=text):
        Synthetic()(BoundarySpec("cut", (TensorSpec((4, 2), torch.complex64, True),)))


def test_zero_answers_with_zeros_and_learns_nothing() -> None:
    estimator = Zero()(spec(VECTOR, IMAGE))
    answers = estimator(values(VECTOR, IMAGE))
    assert [tuple(answer.shape) for answer in answers] == [VECTOR, IMAGE]
    assert not any(answer.any() for answer in answers)
    assert list(estimator.parameters()) == []


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("target", ["fused", "scheduled"])
def test_stale_is_the_exponential_average_of_the_targets_batch_means(mean: bool, target: str) -> None:
    model = mlp(6, 5, 3).double()
    reduction = "mean" if mean else "sum"
    loss = nn.CrossEntropyLoss(reduction=reduction)
    net = dnifx.decouple(model, ["1"], args=(torch.randn(4, 6).double(),), gradient=Stale(decay=0.8), loss=loss)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    average = torch.zeros(1, 5).double()
    for batch in (4, 7, 4):
        x, y = torch.randn(batch, 6).double(), torch.randint(0, 3, (batch,))
        h = torch.relu(model[0](x)).detach().requires_grad_()
        per_example = torch.autograd.grad(F.cross_entropy(model[2](h), y, reduction="sum"), h)[0]
        answer = net.program.interfaces[0].estimator((h.detach(),))[0]
        torch.testing.assert_close(answer, average.expand(batch, 5))
        if target == "fused":
            net.zero_grad()
            torch.autograd.backward(loss(net(x), y))
            weight = model[0].weight.grad
            scale = 1 / batch if mean else 1.0
            passed = (average * scale).expand(batch, 5) * (h > 0)
            torch.testing.assert_close(weight, passed.T @ x)
        else:
            trainer.step(x, target=y)
        average = 0.8 * average + 0.2 * per_example.mean(0, keepdim=True)
    torch.testing.assert_close(net.program.interfaces[0].estimator.get_buffer("average_0"), average)


def test_stale_keeps_an_average_for_each_value_and_saves_it() -> None:
    estimator = Stale()(spec(VECTOR, IMAGE))
    assert {name: tuple(b.shape) for name, b in estimator.named_buffers()} == {
        "average_0": (1, 6),
        "average_1": (1, 3, 5, 5),
    }
    assert {"average_0", "average_1"} < set(estimator.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_stale_needs_a_decay_between_zero_and_one(decay: float) -> None:
    with pytest.raises(EstimatorError, match=rf"Stale\(decay={decay}\): the decay must be in \[0, 1\)"):
        Stale(decay)


def test_an_oracle_cannot_be_asked_and_locks_its_producer() -> None:
    estimator = Oracle()(spec(VECTOR))
    with pytest.raises(EstimatorError, match="an oracle knows the gradient only after the backward pass"):
        estimator(values(VECTOR))
    net = dnifx.decouple(mlp(6, 5, 3), ["1"], args=(torch.randn(4, 6),), gradient=Oracle(), loss=F.cross_entropy)
    assert net.program.interfaces[0].locked
    text = str(net.program.schedule)
    assert "S0" not in text
    assert text.index("T0") < text.index("B0")
    assert text.index("B1") < text.index("T0")


@pytest.mark.parametrize("name", ["synthetic", "zero", "stale", "oracle"])
def test_estimators_by_name_are_frozen_factories(name: str) -> None:
    factory: Any = estimators.BY_NAME[name]
    assert dataclasses.is_dataclass(factory)
    field = next(iter(dataclasses.fields(factory)), None)
    if field is not None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(factory, field.name, 3)
    made = [estimators.BY_NAME[name](spec(VECTOR)) for _ in range(2)]
    assert made[0] is not made[1]


def test_a_synthetic_gradient_learns_the_gradient_that_arrives() -> None:
    torch.manual_seed(0)
    model = mlp(6, 8, 3)
    net = dnifx.decouple(
        model,
        ["1"],
        args=(torch.randn(4, 6),),
        gradient=Synthetic(0),
        context="label",
        num_classes=3,
        loss=F.cross_entropy,
    )
    trainer = net.trainer(
        lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        estimator_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    )
    x = torch.randn(64, 6)
    y = torch.randint(0, 3, (64,))
    cosines = [float(trainer.step(x, target=y, diagnose=True).diagnostics["1"]["cosine"]) for _ in range(150)]
    assert cosines[0] == 0
    assert cosines[-1] > 0.9
