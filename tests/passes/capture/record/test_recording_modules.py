"""Modules that are shared, hooked, made in forward or checkpointed: the smallest model of each, recorded."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from dnifx.passes.capture.record.recording import record
from dnifx.runtime.emitted.checkpoints import regions_of
from tests.passes.capture.record.recorded import Wrapped, holds_for, recorded


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.lstm(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        return self.head(padded).sum(1)  # type: ignore[no-any-return]


def test_packed_sequences() -> None:
    model = Packed()
    recording = recorded(model, torch.randn(3, 6, 3), torch.tensor([6, 2, 4]))
    assert "lstm" in [node.target for node in recording.graph.nodes]
    assert holds_for(recording, model, torch.randn(3, 6, 3), torch.tensor([5, 6, 1]))


class MadeInForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(0.5))(x)  # type: ignore[no-any-return]


class ParametersMadeInForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(4, 4)(x)  # type: ignore[no-any-return]


def test_modules_made_in_forward() -> None:
    recorded(MadeInForward(), torch.randn(3, 4))
    model = Wrapped(ParametersMadeInForward())
    assert holds_for(recorded(model, torch.randn(3, 4)), model, torch.randn(5, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.alias = self.middle

    def forward(self, ids: Tensor) -> Tensor:
        x = self.alias(self.middle(self.embedding(ids)))
        return self.head(x) + F.linear(x, self.embedding.weight)  # type: ignore[no-any-return]


def test_shared_parameters_and_modules() -> None:
    recording = recorded(Tied(), torch.randint(0, 9, (2, 3)))
    targets = [node.target for node in recording.graph.nodes if node.op == "call_module"]
    assert targets == ["embedding", "middle", "middle", "head"]
    assert [node.target for node in recording.graph.nodes if node.op == "get_attr"] == ["embedding.weight"]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU())
        self.last = nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(x)
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    recording = recorded(Checkpointed(reentrant), torch.randn(3, 4))
    assert "block.0" in [node.target for node in recording.graph.nodes]
    (region,) = {region for node in recording.graph.nodes for region in regions_of(node)}
    assert "checkpoint(self.block, x" in region.place
    assert [node.target for node in recording.graph.nodes if regions_of(node)] == ["block.0", "block.1", "block.2"]
    whole = record(Wrapped(Checkpointed(reentrant)), (torch.randn(3, 4),), {}, keep_whole=("inner",))
    assert not any(regions_of(node) for node in whole.graph.nodes)


def test_forward_hooks_run_as_they_do_in_the_model() -> None:
    model = Wrapped(nn.ReLU())
    model.inner.register_forward_hook(lambda module, args, output: output * 2)
    recording = recorded(model, torch.randn(3, 4))
    model.middle.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert holds_for(recording, model, torch.randn(3, 4))


def test_parametrised_modules_are_leaves() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    recording = recorded(model, torch.randn(3, 4))
    assert [node.target for node in recording.graph.nodes if node.op == "call_module"] == ["0", "1"]


class Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scaled = {name: parameter * self.scale for name, parameter in self.linear.named_parameters()}
        return torch.func.functional_call(self.linear, scaled, (x,))  # type: ignore[no-any-return]


def test_functional_call_uses_the_parameters_it_was_given() -> None:
    recorded(Swapped(), torch.randn(3, 4))
