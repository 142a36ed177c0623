"""Inputs without a batch dimension are told of: what a layer takes as one example is no batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.errors import DnifxWarning
from dnifx.ir import Program
from dnifx.passes.insert.unbatched import warn_without_batch
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import run_passes
from tests.passes.programs import SYMBOLIC


class Recurrent(nn.Module):
    """An embedding, an LSTM and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.core, self.out = nn.Embedding(9, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, ids: Tensor, state: Any = None) -> Any:
        y, state = self.core(self.embed(ids), state)
        return self.out(y), state


class Functional(nn.Module):
    """Layers by functions, behind operations that keep the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear((x - 1) / 2, self.first))
        result: Tensor = self.second(h)
        return result


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 2))


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


def signals() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.1), nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "a state of a policy": (policy, "0", torch.randn(4)),
    "an image": (images, "0", torch.randn(3, 8, 8)),
    "a signal": (signals, "1", torch.randn(3, 8)),
    "a sentence": (Recurrent, "embed", torch.randint(0, 9, (7,))),
    "a state by functions": (Functional, "tanh", torch.randn(4)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_example_is_told_of_and_a_batch_is_not(name: str) -> None:
    make, cut, example = CASES[name]
    with pytest.warns(DnifxWarning, match=r"as one example, without a batch dimension.*x\[None\]"):
        dnifx.decouple(make(), cut, args=(example,))
    for size in (1, 3):
        dnifx.decouple(make(), cut, args=(torch.stack([example] * size),))


@pytest.mark.parametrize("name", CASES)
def test_an_oracle_needs_no_batch(name: str) -> None:
    make, cut, example = CASES[name]
    dnifx.decouple(make(), cut, args=(example,), gradient="oracle")


class Alone(nn.Module):
    """One layer on the input, and nothing else."""

    def __init__(self, layer: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x: Tensor) -> Any:
        return self.layer(*[x] * self.inputs)


@pytest.mark.parametrize(
    ("layer", "inputs", "shape"),
    [
        (nn.Linear(4, 4), 1, (4,)),
        (nn.Bilinear(4, 4, 4), 2, (4,)),
        (nn.GRUCell(4, 4), 1, (4,)),
        (nn.LSTM(4, 4), 1, (7, 4)),
        (nn.MultiheadAttention(4, 2), 3, (7, 4)),
        (nn.TransformerEncoderLayer(4, 2, 8), 1, (7, 4)),
        (nn.Conv1d(4, 4, 1), 1, (4, 7)),
        (nn.Conv2d(4, 4, 1), 1, (4, 7, 7)),
        (nn.Conv3d(4, 4, 1), 1, (4, 3, 3, 3)),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else None,
)
def test_every_layer_that_takes_one_example_is_known(layer: nn.Module, inputs: int, shape: tuple[int, ...]) -> None:
    def measured(*shape: int) -> Program:
        return run_passes(Program(Alone(layer, inputs), (torch.randn(shape),)), (SYMBOLIC, MeasureNodes()))

    with pytest.warns(DnifxWarning, match="takes the input x .* as one example"):
        warn_without_batch(measured(*shape))
    warn_without_batch(measured(3, *shape))


def test_a_layer_on_what_is_pooled_over_the_batch_is_no_single_example() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return h * self.gate(h.mean(0))

    dnifx.decouple(Pooled(), "tanh", args=(torch.randn(3, 4),))


def test_a_state_in_time_without_a_batch_is_told_of() -> None:
    example = torch.randint(0, 9, (7,)), (torch.zeros(1, 5), torch.zeros(1, 5))
    with pytest.warns(DnifxWarning, match="'core' takes the input ids"):
        dnifx.decouple(Recurrent(), dnifx.Recurrent("state", "1"), args=example)
