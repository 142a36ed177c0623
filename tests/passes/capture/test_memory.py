"""The proof at other batch sizes: it takes no more memory than a training step, and finds what is fixed all the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.memory import peaks, residual_network, transformer
from dnifx.ir import Program
from dnifx.passes.capture import verification
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.comparison import Comparison
from dnifx.passes.capture.record.recording import record
from dnifx.passes.capture.verification import verify_capture


@pytest.mark.parametrize("make", [residual_network, transformer])
def test_decoupling_takes_no_more_memory_than_a_training_step(
    make: Callable[..., tuple[nn.Module, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "KEPT_BYTES", 2**18)
    torch.manual_seed(0)
    step, decoupled = peaks(*make(4, 3))
    assert decoupled < 1.1 * step


class Rows(nn.Module):
    """Takes as many rows as there are examples: a graph that holds their number fixed differs for more examples only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.body(x))[: x.shape[0]])
        return scores


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is right for four examples only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient * (1 if len(gradient) == 4 else 2)


def scaled(x: Tensor) -> Tensor:
    made: Tensor = Scaled.apply(x)
    return made


def with_fixed_rows(graph: fx.Graph) -> None:
    (size,) = [node for node in graph.nodes if node.target == "size"]
    size.replace_all_uses_with(4)
    graph.erase_node(size)


def with_scaled_gradient(graph: fx.Graph) -> None:
    tanh = next(node for node in graph.nodes if node.target is torch.tanh)
    with graph.inserting_after(tanh):
        inserted = graph.call_function(scaled, (tanh,))
    tanh.replace_all_uses_with(inserted, lambda user: user is not inserted)


def verified(change: Callable[[fx.Graph], None]) -> list[str]:
    model, x = Rows(), torch.randn(4, 3)
    found: CapturedGraph = record(model, (x,), {})
    change(found.graph)
    return verify_capture(Program(model, (x,)), found).differences


@pytest.mark.parametrize("most", [0, 2**23])
def test_a_batch_size_that_the_graph_holds_fixed_is_found(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "KEPT_BYTES", most)
    assert verified(lambda graph: None) == []
    assert "at twice the batch size" in verified(with_fixed_rows)[0]


@pytest.mark.parametrize(("most", "where"), [(0, "half"), (2**23, "twice")])
def test_a_gradient_that_is_wrong_for_another_batch_is_found(
    most: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "KEPT_BYTES", most)
    assert f"at {where} the batch size, seed 1: gradient of body.weight" in verified(with_scaled_gradient)[0]


class Penalised(nn.Module):
    """Differentiates inside forward, which needs what the first half of forward keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(self.body(x).sum(), x, create_graph=True)
        return slope[: x.shape[0]]


class Jacobian(Penalised):
    """Differentiates by a transform, which takes no hooks on saved tensors."""

    def forward(self, x: Tensor) -> Tensor:
        jacobian: Tensor = torch.func.vmap(torch.func.jacrev(self.body))(x)
        return jacobian.flatten(1)[: x.shape[0]]


def test_a_model_that_differentiates_by_itself_is_compared_with_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "KEPT_BYTES", 1)
    model, x = Penalised(), torch.randn(4, 3)
    found = record(model, (x,), {})
    assert verify_capture(Program(model, (x,)), found).differences == []
    with_fixed_rows(found.graph)
    assert "at twice the batch size" in verify_capture(Program(model, (x,)), found).differences[0]
    comparison = Comparison(Jacobian(), found)
    assert comparison.expected((x,), {}, 0, 1).backward
