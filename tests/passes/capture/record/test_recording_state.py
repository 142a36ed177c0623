"""Random draws, Python state, caches and buffers: the smallest model of each construct, recorded."""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dnifx.errors import CaptureError
from dnifx.passes.capture.comparison import Comparison, replay
from dnifx.passes.capture.record.generators import python_draws, seed
from dnifx.passes.capture.record.hazards import UnsafeForward
from dnifx.passes.capture.record.recording import record
from tests.passes.capture.record.recorded import SizeBranch, Wrapped, kept, recorded, run


class TorchLayerDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand(1) < 0.5 else x * 3


class PythonLayerDrop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else x * 3


class NumpyNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.array([float(each) for each in np.random.rand(4)])).to(x)


@pytest.mark.parametrize("kind", [TorchLayerDrop, PythonLayerDrop, NumpyNoise])
def test_random_control_flow_is_kept_whole(kind: type[nn.Module]) -> None:
    model = Wrapped(kind())
    recording = record(model, (torch.randn(3, 4),), {})
    assert kept(recording) == ["inner"]
    found = Comparison(model, recording).under_seeds((torch.randn(3, 4),), {}, seeds=range(6))
    assert found == []


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_numbers_that_a_forward_counts_are_inputs_and_are_left_on_the_model() -> None:
    model, x = Wrapped(Counter()), torch.randn(3, 4)
    recording = recorded(model, x)
    assert kept(recording) == []
    assert model.inner.calls == 0
    assert [each.path for each in recording.signature.numbers] == ["self.inner.calls"]
    assert [each.path for each in recording.signature.writes] == ["self.inner.calls"]
    run, other = replay(model, recording), Wrapped(Counter())
    other.load_state_dict(model.state_dict())
    for _ in range(3):
        assert torch.equal(run(x), other(x))
    assert model.inner.calls == other.inner.calls == 3


def test_a_draw_that_nothing_follows_is_refused_at_the_root() -> None:
    seed(0)
    before = python_draws()
    with pytest.raises(
        CaptureError, match=r"no graph repeats a plain float of what numpy\.random\.rand draws.*for each in"
    ):
        record(NumpyNoise(), (torch.randn(3, 4),), {})
    assert python_draws() == before
    assert kept(record(SizeBranch(), (torch.randn(3, 4),), {})) == []


class Memory(nn.Module):
    """A module whose tensors leave by another door: an attribute that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.linear(x)
        return x + 1


class ReadsMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(x)) + self.memory.seen  # type: ignore[no-any-return]


def test_a_tensor_that_leaves_by_an_attribute_opens_the_module() -> None:
    model, x = ReadsMemory(), torch.randn(2, 4)
    recording = record(model, (x,), {}, open_paths=())
    assert Comparison(model, recording).under_seeds((x,), {}) == []
    assert "memory.linear" in [node.target for node in recording.graph.nodes]
    recorded(ReadsMemory(), torch.randn(2, 4))


class Cache:
    """A plain object that modules fill."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys.append(self.key(x))
        return x + sum(cache.keys)


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return x, cache


@pytest.mark.parametrize("open_paths", [None, ()])
def test_a_cache_comes_back_in_its_own_type(open_paths: tuple[str, ...] | None) -> None:
    model, x = WithCache(), torch.randn(2, 4)
    recording = record(model, (x,), {}, open_paths=open_paths)
    assert Comparison(model, recording).under_seeds((x,), {}) == []
    first, second = (run(recording, model)(x)[1] for _ in range(2))
    assert type(first) is Cache
    assert first is not second
    assert len(second.keys) == 3
    assert torch.equal(second.keys[2], model(x)[1].keys[2])


class GivesBack(Attention):
    def forward(self, x: Tensor, cache: Cache) -> Any:
        return super().forward(x, cache), cache


def test_a_cache_goes_in() -> None:
    cache = Cache()
    cache.keys.append(torch.randn(2, 4))
    recording = recorded(GivesBack(), torch.randn(2, 4), cache)
    assert recording.signature.inputs == ("x", "cache_keys_0")
    assert len(cache.keys) == 1


def test_a_tensor_that_is_left_in_an_argument_alone_is_refused() -> None:
    features: list[Tensor] = []
    for filled in (Cache(), SimpleNamespace(keys=features)):
        with pytest.raises(UnsafeForward, match="leaves a tensor in its argument 'cache_keys_0'"):
            recorded(Attention(), torch.randn(2, 4), filled)
    assert features == []


@dataclass
class Output:
    hidden: Tensor
    loss: Tensor | None = None
    history: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = [self.hidden, *self.history]


def test_a_dataclass_with_a_post_init_comes_back_as_it_was() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x * 2, history=[x])

    recording = recorded(Model(), torch.randn(3))
    answer = run(recording, Model())(torch.ones(3))
    assert type(answer) is Output
    assert [float(item[0]) for item in answer.history] == [2.0, 1.0]


class ReplacesBuffer(nn.Module):
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.running = 0.9 * self.running + 0.1 * x.detach().mean(0)
        return x - self.running


class AddsToBuffer(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return x / self.steps


def test_buffers_changed_in_forward() -> None:
    replaces, twin = Wrapped(ReplacesBuffer()), Wrapped(ReplacesBuffer())
    twin.load_state_dict(replaces.state_dict())
    recording = recorded(replaces, torch.randn(3, 4))
    assert kept(recording) == []
    for x in torch.randn(3, 2, 4):
        assert torch.equal(run(recording, replaces)(x), twin(x))
    assert torch.equal(replaces.get_buffer("inner.running"), twin.get_buffer("inner.running"))
    model = AddsToBuffer()
    recording = recorded(model, torch.randn(3, 4))
    assert int(model.steps) == 0
    run(recording, model)(torch.ones(1, 4))
    assert int(model.steps) == 1


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_tensors_that_are_no_buffers_are_constants() -> None:
    model = Frozen()
    recording = recorded(model, torch.randn(3, 4))
    assert any(value is model.table for value in recording.constants.values())
    assert all(name.startswith("captured_constants.constant") for name in recording.constants)


class Appends(nn.Module):
    def forward(self, x: Tensor, log: list[str]) -> Tensor:
        log.append("called")
        return x * len(log)


class KeepsLog(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Appends() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        log: list[str] = []
        for layer in self.layers:
            x = layer(x, log)
        return x


def test_a_list_that_modules_fill_starts_empty_in_every_call() -> None:
    model = KeepsLog()
    recording = record(model, (torch.ones(2),), {}, open_paths=())
    assert [run(recording, model)(torch.ones(2)).tolist() for _ in range(2)] == [[2.0, 2.0], [2.0, 2.0]]
