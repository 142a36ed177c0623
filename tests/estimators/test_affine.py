"""The default estimator: it costs at most its budget, has no batch norm, and starts at zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.errors import CostWarning, EstimatorError
from dnifx.estimators import Affine, BoundarySpec
from dnifx.estimators.affine import block_within
from dnifx.ir import TensorSpec

LABEL: dict[str, Any] = {"context": "label", "num_classes": 10}
WIDE: dict[str, Any] = {"context": lambda y: torch.nn.functional.one_hot(y, 40).float(), "num_classes": 40}


class Tokens(nn.Module):
    """A transformer's beginning and end, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.readout = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.readout(self.layer(self.embedding(x)))
        return answer.movedim(-1, 1)


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
    )


def convolutional() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(block, nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 5 * 5, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str], Tensor]] = {
    "vectors": (dense, torch.randn(8, 13), ["1", "4"], torch.arange(8) % 10),
    "maps": (convolutional, torch.randn(4, 3, 16, 16), ["0", "2"], torch.arange(4) % 10),
    "tokens": (Tokens, torch.arange(20).reshape(4, 5), ["embedding", "layer"], torch.arange(20).reshape(4, 5) % 10),
    "no layer at all before the cut": (dense, torch.randn(8, 13), ["0", "1", "4"], torch.arange(8) % 10),
}


@pytest.mark.parametrize("options", [{}, LABEL, WIDE], ids=["alone", "label", "features"])
@pytest.mark.parametrize("case", CASES)
def test_it_costs_at_most_a_quarter_of_the_partition_that_makes_the_values(case: str, options: dict[str, Any]) -> None:
    make, x, cuts, _ = CASES[case]
    net = dnifx.decouple(make(), cuts, args=(x,), **options)
    costly = [each for each in net.program.partitions if each.flops]
    assert costly
    for boundary, interface in zip(net.boundaries, net.program.interfaces, strict=True):
        limit = net.program.partitions[boundary.producer].flops / 4
        assert interface.flops is not None
        assert interface.flops <= limit or (options is WIDE and limit < 2 * len(x) * 50 * boundary.specs[0].shape[-1])
        assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in interface.estimator.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, LABEL], ids=["alone", "label"])
@pytest.mark.parametrize("case", CASES)
def test_it_starts_at_zero_and_learns_in_batches_of_any_size(
    case: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    make, x, cuts, y = CASES[case]
    torch.manual_seed(0)
    example = x.to(dtype) if x.is_floating_point() else x
    net = dnifx.decouple(make().to(dtype), cuts, args=(example,), loss=cross_entropy, **options)
    trainer = net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    first = trainer.step(example, target=y, diagnose=True)
    assert all(float(found["estimate_norm"]) == 0 for found in first.diagnostics.values())
    if "4" in cuts:
        net.original.get_submodule("3").eval()  # the model's own batch norm takes no batch of one
    for size in (1, 2, len(x)):
        result = trainer.step(example[:size], target=y[:size], diagnose=True)
    assert all(float(found["estimate_norm"]) > 0 for found in result.diagnostics.values())
    assert all(bool(each.isfinite().all()) for each in net.parameters())


@given(st.integers(1, 70), st.floats(0, 6000))
def test_blocks_are_the_largest_that_fit(features: int, budget: float) -> None:
    """Against a search over all sizes: no equal division into fewer blocks fits."""

    def cost(size: int) -> int:
        return -(-features // size) * size * size

    block = block_within(features, budget)
    assert block == 1 or cost(block) <= budget
    fewer = {-(-features // blocks) for blocks in range(1, -(-features // block))}
    assert all(cost(size) > budget for size in fewer if size > 1)


def spec(*values: TensorSpec, **options: Any) -> BoundarySpec:
    return BoundarySpec("here", values, **options)


@pytest.mark.parametrize("features", [6, 7])
def test_blocks_map_neighbouring_features_and_a_label_is_looked_up(features: int) -> None:
    value = TensorSpec((5, features), torch.float64)
    estimator = Affine()(spec(value, context=3, classes=3, flops=2 * 5 * 4 * 16, batch=5)).double()
    only: Any = estimator.get_submodule("maps.0")
    generator = torch.Generator().manual_seed(0)
    for parameter in estimator.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x, label = torch.randn(5, features).double(), torch.tensor([0, 2, 1, 1, 0])
    whole = torch.block_diag(*only.weight)[:features, :features] * only.blocks**0.5
    expected = x @ whole.T + only.told.weight[label] + only.bias
    (answer,) = estimator((x,), nn.functional.one_hot(label, 3).double())
    assert 1 < only.block < features
    torch.testing.assert_close(answer, expected)


def test_values_share_the_budget_and_what_has_no_batch_sees_no_context() -> None:
    values = (TensorSpec((4, 8), torch.float32), TensorSpec((4, 24), torch.float32), TensorSpec((3,), torch.float32))
    estimator = Affine()(spec(*values, context=2, classes=2, flops=8 * 4 * 600, batch=4))
    answers = estimator((torch.ones(4, 8), torch.ones(4, 24), torch.ones(3)), torch.eye(2)[[0, 1, 0, 1]])
    assert [answer.shape for answer in answers] == [(4, 8), (4, 24), (3,)]
    assert [f"maps.{index}.told" in dict(estimator.named_modules()) for index in range(3)] == [True, True, False]


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(EstimatorError, match="budget must be above 0"):
        Affine(0)
    with pytest.raises(EstimatorError, match="needs real floating point"):
        Affine()(spec(TensorSpec((4, 8), torch.int64)))


def test_estimators_that_need_more_flops_than_the_model_are_told_of() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1), nn.Flatten(), nn.Linear(4 * 64 * 64, 2))
    x = torch.randn(4, 3, 64, 64)
    with pytest.warns(CostWarning, match=r"the estimators have [\d,]+ FLOPs, .* times .* of boundary '1'.*Affine"):
        dnifx.decouple(model, ["1"], args=(x,), gradient="paper", verify=False)
    dnifx.decouple(model, ["1"], args=(x,), verify=False)
