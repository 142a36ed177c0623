"""Recording plain models: the graph, its names, its signature, and that the model is left alone."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dnifx.errors import CaptureError, InputError
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.comparison import Comparison, replay
from dnifx.passes.capture.record.recording import record


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.drop(self.norm(self.linear(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x * self.scale
        return x if mask is None else x * mask


def differences(recording: CapturedGraph, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    recording.graph.lint()
    return Comparison(model, recording).under_seeds(args, kwargs)


def targets(recording: CapturedGraph, op: str = "call_module") -> list[str]:
    return [str(node.target) for node in recording.graph.nodes if node.op == op]


def test_graph_calls_the_models_own_modules() -> None:
    model = Residual()
    recording = record(model, (torch.randn(4, 8),), {})
    assert targets(recording)[:3] == ["blocks.0.linear", "blocks.0.norm", "blocks.0.drop"]
    assert targets(recording, "get_attr") == ["scale"]
    assert targets(recording, "placeholder") == ["x"]
    assert recording.constants == {}
    assert recording.kept == ()


def test_output_is_one_flat_tuple() -> None:
    recording = record(Residual(), (torch.randn(4, 8),), {})
    output = next(iter(reversed(recording.graph.nodes)))
    assert output.op == "output"
    assert isinstance(output.args[0], tuple)
    assert all(isinstance(item, fx.Node) for item in output.args[0])


def test_nodes_know_the_modules_they_lie_in() -> None:
    recording = record(Residual(), (torch.randn(4, 8),), {})
    relu = next(node for node in recording.graph.nodes if node.name == "relu")
    assert relu.meta["nn_module_stack"] == OrderedDict({"blocks.0": ("blocks.0", Block)})
    assert all("nn_module_stack" in node.meta for node in recording.graph.nodes if node.op != "output")


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_any_batch_size(batch: int) -> None:
    model = Residual()
    recording = record(model, (torch.randn(4, 8),), {})
    assert differences(recording, model, torch.randn(batch, 8)) == []


def test_train_and_eval_in_one_graph_where_modules_hold_the_mode() -> None:
    model = Residual()
    recording = record(model, (torch.randn(4, 8),), {})
    model.eval()
    assert differences(recording, model, torch.randn(4, 8)) == []


def test_a_graph_recorded_in_eval_mode_trains() -> None:
    model = Residual().eval()
    recording = record(model, (torch.randn(4, 8),), {})
    model.train()
    assert differences(recording, model, torch.randn(4, 8)) == []


def test_the_model_is_left_as_it_was() -> None:
    model = Residual()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    record(model, (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),), {})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_parameter_written_in_forward_is_put_back() -> None:
    model = Clamped()
    before = model.linear.weight.detach().clone()
    recording = record(model, (torch.randn(2, 4),), {})
    assert torch.equal(model.linear.weight, before)
    assert differences(recording, model, torch.randn(2, 4)) == []
    replay(model, recording)(torch.randn(2, 4))
    assert torch.equal(model.linear.weight, before * 0.5)


def test_the_example_inputs_are_left_as_they_were() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    x = torch.ones(3)
    record(InPlace(), (x,), {})
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("open_paths", [("blocks.1",), (), ("blocks.0", "blocks.2")])
def test_only_what_is_asked_for_is_opened(open_paths: tuple[str, ...]) -> None:
    model = nn.Sequential(OrderedDict(first=Residual(), second=Residual()))
    recording = record(model, (torch.randn(4, 8),), {}, open_paths=tuple(f"first.{path}" for path in open_paths))
    called = targets(recording)
    assert "second" in called
    for index in range(3):
        opened = f"blocks.{index}" in open_paths
        assert (f"first.blocks.{index}.linear" in called) == opened
    assert differences(recording, model, torch.randn(4, 8)) == []


def test_keep_whole_keeps_a_module_as_one_node() -> None:
    model = Residual()
    recording = record(model, (torch.randn(4, 8),), {}, keep_whole=("blocks.1",))
    assert "blocks.1" in targets(recording)
    assert [kept.path for kept in recording.kept] == ["blocks.1"]
    assert differences(recording, model, torch.randn(4, 8)) == []


def test_a_module_called_twice_is_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = nn.Linear(4, 4)
            self.block = Block(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.leaf(self.block(self.leaf(x))))  # type: ignore[no-any-return]

    model = Twice()
    recording = record(model, (torch.randn(3, 4),), {})
    assert [node.meta.get("call") for node in recording.graph.nodes if node.target == "leaf"] == [None, 1]
    relus = [node for node in recording.graph.nodes if node.name.startswith("relu")]
    assert [node.meta.get("call") for node in relus] == [None, 1]
    assert [list(node.meta["nn_module_stack"]) for node in relus] == [["block"], ["block@1"]]
    assert differences(recording, model, torch.randn(3, 4)) == []


class Batch(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass
class Answer:
    score: Tensor
    parts: dict[str, Any]
    extra: Tensor | None = None


class Structured(nn.Module):
    def forward(
        self, batch: Batch, options: dict[str, Any], *rest: Tensor, flag: bool = False, **named: Tensor
    ) -> Answer:
        total = batch.left * 2 if batch.right is None else batch.left + batch.right
        for tensor in (*rest, *named.values()):
            total = total + tensor
        if flag:
            total = -total
        return Answer(total, {"list": [total.exp(), None], "name": options["name"], "size": total.shape[0]})


def test_inputs_and_outputs_keep_their_structure() -> None:
    x = torch.randn(3)
    args = (Batch(x, x + 1), {"mask": x * 2, "name": "a"}, x + 2)
    kwargs = {"flag": True, "bias": x + 3}
    recording = record(Structured(), args, kwargs)
    assert recording.signature.inputs == ("batch_left", "batch_right", "options_mask", "rest_0", "bias")
    answer = replay(Structured(), recording)(*args, **kwargs)
    assert type(answer) is Answer
    assert answer.extra is None
    assert answer.parts["name"] == "a"
    assert answer.parts["size"] == 3
    assert torch.equal(answer.parts["list"][0], answer.score.exp())
    assert differences(recording, Structured(), *args, **kwargs) == []


@pytest.mark.parametrize(
    "change",
    [
        {"args": (Batch(torch.ones(3), None), {"name": "a"})},
        {"args": (Batch(torch.ones(3), torch.ones(3)), {"name": "b"})},
        {"args": (Batch(torch.ones(3), torch.ones(3)), {"name": "a"}), "kwargs": {"flag": True}},
        {"args": (Batch(torch.ones(3, 1), torch.ones(3, 1)), {"name": "a"})},
    ],
)
def test_another_structure_is_refused_with_the_difference(change: dict[str, Any]) -> None:
    args = (Batch(torch.ones(3), torch.ones(3)), {"name": "a"})
    recording = record(Structured(), args, {})
    other = change["args"], change.get("kwargs", {})
    with pytest.raises(InputError, match="expected"):
        recording.signature.flatten(*other)
    assert recording.signature.key(*other) != recording.signature.key(args, {})


def test_position_and_keyword_are_one_input_kind() -> None:
    x = torch.randn(4, 8)
    recording = record(Residual(), (x,), {})
    assert recording.signature.key((x,), {}) == recording.signature.key((), {"x": x, "mask": None})
    assert recording.signature.flatten((), {"x": x})[0] is x


def test_the_input_kind_holds_training_flags_of_opened_modules() -> None:
    model = Residual()
    recording = record(model, (torch.randn(4, 8),), {})
    before = recording.signature.key((torch.randn(4, 8),), {})
    model.blocks[0].eval()
    assert recording.signature.key((torch.randn(4, 8),), {}) != before


def test_flatten_can_be_compiled() -> None:
    recording = record(Residual(), (torch.randn(4, 8),), {})

    def double(x: Tensor) -> Tensor:
        return recording.signature.flatten((x,), {})[0] * 2  # type: ignore[no-any-return]

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(4, 8)), torch.full((4, 8), 2.0))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="cannot be called with these arguments"):
        record(Residual(), (), {"y": torch.ones(1)})


def test_a_model_that_fails_is_reported_with_its_line() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(99, 1)

    with pytest.raises(
        CaptureError, match=r"fails on the example inputs.*\(test_recording.py:\d+: return x @ torch.ones"
    ):
        record(Broken(), (torch.ones(2, 3),), {})


def test_nodes_grow_linearly_with_depth() -> None:
    def nodes(depth: int) -> int:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(2, 2), nn.ReLU())]
        return len(record(nn.Sequential(*layers), (torch.ones(1, 2),), {}).graph.nodes)

    assert nodes(20) == 42
    assert nodes(400) == 802


STEPS = ("linear", "add", "mul_", "view", "chunk", "dropout", "set", "cat", "tied", "matmul", "detach")


class Program(nn.Module):
    """A model whose forward runs a list of steps."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict(
            {str(index): nn.Linear(4, 4) for index, step in enumerate(steps) if step == "linear"}
        )
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for index, step in enumerate(self.steps):
            x = self.step(index, step, x, kept)
        return x

    def step(self, index: int, step: str, x: Tensor, kept: Tensor) -> Tensor:
        count = x.shape[0]
        match step:
            case "linear":
                return self.layers[str(index)](x)  # type: ignore[no-any-return]
            case "add":
                return x + kept / count
            case "mul_":
                return (x + 0).mul_(0.5)
            case "view":
                return x.view(count * 2, 2).tanh().reshape(count, -1)
            case "chunk":
                left, right = x.chunk(2, dim=1)
                return torch.cat([right, left], 1)
            case "dropout":
                return F.dropout(x, 0.5, self.training)
            case "set":
                made = torch.zeros(count, 4)
                made[:, 1:] = x[:, : 4 - 1]
                return made
            case "cat":
                return torch.cat([x, kept], 1)[:, 2:6]
            case "tied":
                return F.linear(x, self.weight)
            case "matmul":
                return x @ self.weight
        return x.detach() + x


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=7), st.integers(1, 5))
def test_random_programs_are_recorded_faithfully(steps: list[str], batch: int) -> None:
    torch.manual_seed(len(steps))
    model = Program(steps)
    recording = record(model, (torch.randn(3, 4),), {})
    assert differences(recording, model, torch.randn(batch, 4)) == []


def test_verify_sees_a_wrong_graph() -> None:
    model = Program(["linear", "matmul", "linear"])
    x = torch.randn(3, 4)
    recording = record(model, (x,), {})
    node = next(node for node in recording.graph.nodes if node.target == "matmul")
    with recording.graph.inserting_before(node):
        doubled = recording.graph.call_function(torch.mul, (node.args[0], 2))
    node.args = (doubled, node.args[1])
    found = Comparison(model, recording).under_seeds((x,), {})
    assert any("output" in text for text in found)
    assert any("gradient of layers.0.weight" in text for text in found)
