"""What every node costs: against counts by hand, on models without memory, and with the model left alone."""

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx.errors import CaptureError
from dnifx.ir import Measure, Program, TensorSpec
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.flops import recurrent_flops
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import run_passes
from tests.passes.programs import compiled, mlp


class Function(nn.Module):
    """Runs a function on its input and a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def measured(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    return compiled(model, "each", *args, until="measure", kwargs=kwargs)


def only(program: Program, name: str) -> Measure:
    return program.measures[name]


def test_flops_of_layers_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    program = measured(model, torch.randn(4, 3, 6, 6))
    assert only(program, "_0").flops == 2 * 4 * 8 * 6 * 6 * 3 * 5 * 5
    assert only(program, "_1").flops == 0
    assert only(program, "_3").flops == 2 * 4 * 288 * 10
    assert only(program, "_1").cost == 4 * 8 * 6 * 6, "what makes elements costs at least that"
    assert sum(measure.flops for measure in program.measures.values()) == 2 * 4 * (8 * 36 * 75 + 288 * 10)


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda x, w: x @ w, 2 * 3 * 4 * 5),
        (lambda x, w: torch.addmm(x @ w, x, w), 2 * 2 * 3 * 4 * 5),
        (lambda x, w: torch.einsum("bi,io->bo", x, w), 2 * 3 * 4 * 5),
        (lambda x, w: torch.tanh(x), 0),
    ],
)
def test_flops_of_functions_by_hand(function: Callable[[Tensor, Tensor], Tensor], flops: int) -> None:
    program = measured(Function(function, torch.randn(4, 5)), torch.randn(3, 4))
    assert sum(measure.flops for measure in program.measures.values()) == flops


def test_shapes_dtypes_and_gradients() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 2, dtype=torch.float32))
    program = measured(model, torch.zeros(3, 5, dtype=torch.int64))
    assert only(program, "input_1").tensors == (TensorSpec((3, 5), torch.int64),)
    assert only(program, "_0").tensors == (TensorSpec((3, 5, 8), torch.float32, True),)
    assert str(only(program, "_1").tensors[0]) == "f32[3, 5, 2]"
    assert not only(program, "input_1").requires_grad
    assert only(program, "_1").requires_grad


def test_bytes_of_parameters_and_activations() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            flat = h.view(-1)
            return torch.relu_(flat) * 2

    program = measured(Views(), torch.randn(3, 4))
    assert only(program, "linear").parameter_bytes == (4 * 6 + 6) * 4
    assert only(program, "linear").activation_bytes == 3 * 6 * 4
    assert only(program, "x").activation_bytes == 0, "an input is there already"
    assert only(program, "view").activation_bytes == 0, "a view makes no memory"
    assert only(program, "relu_").activation_bytes == 0, "nor does a write in place"
    assert only(program, "mul").activation_bytes == 3 * 6 * 4
    assert only(program, "view").storages == only(program, "linear").storages == only(program, "relu_").storages
    assert only(program, "mul").storages != only(program, "linear").storages


def test_writes_name_what_they_write() -> None:
    def writes(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        g = torch.tanh(h)
        g.add_(h)
        return g.mul(h)

    program = measured(Function(writes, torch.randn(4, 5)), torch.randn(3, 4))
    assert {name: m.writes for name, m in program.measures.items() if m.writes} == {"add_": ("tanh",)}


def test_readers_after_a_write_read_its_result() -> None:
    def writes(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        before = torch.sin(h)
        h.mul_(2)
        return before + torch.cos(h)

    program = measured(Function(writes, torch.randn(4, 5)), torch.randn(3, 4))
    assert program.graph is not None
    sources = {node.name: [source.name for source in node.all_input_nodes] for node in program.graph.nodes}
    assert sources["sin"] == ["matmul"]
    assert sources["cos"] == ["mul_"]


def test_a_reader_of_another_view_keeps_reading_the_whole() -> None:
    def writes(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        h[:, 0].mul_(2)
        return torch.cos(h)

    program = measured(Function(writes, torch.randn(4, 5)), torch.randn(3, 4))
    assert program.graph is not None
    cos = next(node for node in program.graph.nodes if node.name == "cos")
    assert [source.name for source in cos.all_input_nodes] == ["matmul"]


def test_random_draws_are_marked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    program = measured(model, torch.randn(3, 4))
    assert [name for name, measure in program.measures.items() if measure.random] == ["_1"]
    assert not any(measure.random for measure in measured(model.eval(), torch.randn(3, 4)).measures.values())


def test_values_that_are_no_tensors() -> None:
    def sizes(x: Tensor, w: Tensor) -> Tensor:
        parts = torch.chunk(x @ w, 2, 1)
        return parts[0] * x.size(0) + parts[1]

    program = measured(Function(sizes, torch.randn(4, 6)), torch.randn(3, 4))
    assert [str(tensor) for tensor in only(program, "chunk").tensors] == ["f32[3, 3]", "f32[3, 3]"]
    assert not only(program, "chunk").is_tensor
    assert only(program, "size").tensors == ()
    assert only(program, "size").bytes == 0


def test_a_model_on_meta() -> None:
    with torch.device("meta"):
        model = mlp(8, 16, 4, batch_norm=True)
    program = measured(model, torch.empty(5, 8, device="meta"))
    assert only(program, "_0").flops == 2 * 5 * 8 * 16
    assert only(program, "_3").tensors[0].shape == (5, 4)
    assert only(program, "_3").tensors[0].device.type == "meta"


def test_a_model_of_a_hundred_gigabytes_goes_through_all_passes() -> None:
    width, layers = 50_000, 11
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    net = dnifx.decouple(model, 3, args=(torch.empty(2, width, device="meta"),), gradient="zero")
    assert sum(partition.parameter_bytes for partition in net.partitions) == layers * width * width * 4 > 100e9
    assert [partition.flops for partition in net.partitions] == [n * 2 * 2 * width * width for n in (4, 4, 3)]


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    example = torch.randn(3, 4)
    copy = example.clone()
    torch.set_rng_state(state)
    measured(model, example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == objects
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(example, copy)
    assert all(type(value) in (Tensor, nn.Parameter) for value in model.state_dict(keep_vars=True).values())


class NeedsValue(nn.Module):
    """Cannot run on fake tensors: asks for a value; writes its state, its input and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(6), persistent=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.get_buffer("count").add_(1)
        self.get_buffer("scratch").add_(1)
        x.mul_(1.5)
        limit = float(x.abs().max())
        return torch.rand(()) + (x / limit) @ self.weight


def test_a_model_that_needs_values_is_measured_by_a_real_run_and_put_back() -> None:
    model = nn.Sequential(NeedsValue(), nn.Linear(6, 2))
    x = torch.randn(3, 6)
    copy, state = x.clone(), torch.get_rng_state()
    program = measured(model, x)
    assert only(program, "_1").tensors[0].shape == (3, 2)
    assert only(program, "_0").random
    assert any(
        note.startswith("the graph does not run on fake tensors (DataDependent")
        and note.endswith("), so it was measured by a real run of the example inputs")
        for note in program.notes
    )
    assert model[0].get_buffer("count") == 0
    assert torch.equal(model[0].get_buffer("scratch"), torch.zeros(6))
    assert model[0].calls == 0
    assert torch.equal(x, copy)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", range(6))
def test_a_real_run_draws_what_the_recording_drew(number: int) -> None:
    def chosen_by_draws(x: Tensor, weight: Tensor) -> Tensor:
        total = x.sum(0)
        for row in (torch.rand(8) > 0.5).nonzero():
            total = total + x[row[0]]
        return total @ weight

    torch.manual_seed(number)
    given = Program(Function(chosen_by_draws, torch.randn(3, 2)), (torch.randn(8, 3),), {})
    program = run_passes(given, (CaptureGraph(methods=("record",), verify=False), MeasureNodes()))
    assert any("measured by a real run" in note for note in program.notes)


class LeftOut(nn.Module):
    """A block that leaves itself out, by a draw from one of three sources; it is kept whole."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.block, self.source = mlp(4, 4), source

    def drawn(self) -> float:
        drawers: dict[str, Callable[[], float]] = {
            "torch": lambda: float(torch.rand(())),
            "python": random.random,
            "numpy": lambda: float(numpy.random.rand()),
        }
        return drawers[self.source]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.drawn() < 0.5 else x


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_what_modules_leave_out_by_a_draw_does_not_decide_where_to_cut(source: str) -> None:
    found = set()
    for number in range(6):
        model = nn.Sequential(*(LeftOut(source) for _ in range(6)), nn.Linear(4, 2))
        torch.manual_seed(number)
        random.seed(number)
        numpy.random.seed(number)
        net = dnifx.decouple(model, 3, args=(torch.randn(8, 4),), gradient="zero")
        assert net.program.capture is not None
        assert {each.path for each in net.program.capture.kept} == set(map(str, range(6)))
        found.add(tuple(boundary.name for boundary in net.boundaries))
    assert len(found) == 1


def test_an_example_that_does_not_fit_names_the_node_and_the_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(CaptureError, match=r"graph of Sequential does not run .*: node _0 in module '0': RuntimeError"):
        measured(model, torch.randn(3, 5))
    with pytest.raises(CaptureError, match=r"node matmul in module '<?\w*>?'"):
        measured(Function(lambda x, w: x @ w, torch.randn(4, 5)), torch.randn(3, 9))


def test_the_functional_form_of_a_loss_is_measured_too() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.linear(x)
            return logits, F.cross_entropy(logits, y)

    program = measured(WithLoss(), torch.randn(5, 4), y=torch.zeros(5, dtype=torch.int64))
    assert only(program, "cross_entropy").tensors[0].shape == ()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"num_layers": 3},
        {"batch_first": True, "bias": False},
        {"num_layers": 2, "bidirectional": True},
    ],
)
def test_recurrent_layers_cost_a_product_for_each_weight_and_step(kind: Any, options: Any) -> None:
    layer = kind(6, 8, **options)
    program = measured(nn.Sequential(layer), torch.randn(4, 5, 6))
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    assert sum(measure.flops for measure in program.measures.values()) == 2 * 4 * 5 * matrices


def test_the_fused_layers_of_gpus_are_counted_by_their_list_of_weights() -> None:
    weights = [torch.zeros(32, 6), torch.zeros(32, 8), torch.zeros(32), torch.zeros(32)]
    assert recurrent_flops(torch.zeros(4, 5, 6), weights, 4, None, torch.zeros(1, 4, 8)) == 2 * 20 * 32 * (6 + 8)
    assert recurrent_flops(torch.zeros(20, 6), weights, 4) == 2 * 20 * 32 * (6 + 8)
