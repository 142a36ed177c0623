"""Capture by torch.fx: paths kept, what cannot be traced kept whole, the model left as it was."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dnifx
from dnifx.errors import CaptureError
from dnifx.ir import module_path
from dnifx.passes.capture.captured_graph import CapturedGraph
from dnifx.passes.capture.symbolic import trace_symbolically
from dnifx.passes.graph import captured
from tests.passes.programs import Block, Residual, Tied, compiled, mlp, runnable

X = torch.randn(3, 6)


class ByValue(nn.Module):
    """Branches on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        return h if h.sum() > 0 else -h


class ByMode(nn.Module):
    """Does something else in training than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        return F.dropout(h, 0.5, self.training)


class Outer(nn.Module):
    """Holds an inner module between layers that can be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = Block(6)
        self.inner = inner
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.inner(self.block(x)))
        return result


class Stateful(nn.Module):
    """Writes attributes of itself and draws numbers while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.calls = 0
        self.seen: list[Any] = []
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.linear(x)
        self.seen.append(self.last)
        self.extra = random.random()
        result: Tensor = self.norm(self.last)
        return result


class NoGrad(nn.Module):
    """Computes one factor without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        with torch.no_grad():
            scale = h.abs().mean()
        result: Tensor = self.second(h / scale)
        return result


class Constant(nn.Module):
    """Reads a tensor that it does not register, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.offsets = [torch.arange(6.0)]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x + self.offsets[0]) * self.offsets[0]
        return result


def trace(model: nn.Module, *args: Any) -> CapturedGraph:
    return trace_symbolically(model, args or (X,), {})


def calls(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_module_paths_are_the_models_own() -> None:
    graph = trace(Residual()).graph
    assert calls(graph) == ["stem", "blocks.0.linear", "blocks.1.linear", "head"]
    relus = [node for node in graph.nodes if node.name.startswith("relu")]
    assert [module_path(node) for node in relus] == ["blocks.0", "blocks.1"]


def test_modules_parameters_and_buffers_are_the_models_own_objects() -> None:
    model = mlp(6, 6, 2, batch_norm=True)
    net = dnifx.decouple(model, ["0"], args=(X,))
    fused = dict(net.fused.named_modules())
    assert all(fused[path] is module for path, module in model.named_modules() if path)
    held = dict(net.named_parameters())
    assert all(held[name] is parameter for name, parameter in model.named_parameters())
    assert all(dict(net.named_buffers())[name] is buffer for name, buffer in model.named_buffers())


def test_a_parameter_read_by_two_nodes_is_read_by_each_of_them() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight) @ self.weight

    graph = captured(compiled(Reads(), ["tanh"], X, until="capture"))
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    assert [node.target for node in reads] == ["weight", "weight"]
    assert all(len(node.users) == 1 for node in reads)


def test_a_submodule_that_cannot_be_traced_is_kept_whole_with_the_reason() -> None:
    found = trace(Outer(ByValue()))
    assert calls(found.graph) == ["block.linear", "inner", "head"]
    assert [kept.path for kept in found.kept] == ["inner"]
    assert "TraceError" in found.kept[0].reason
    program = compiled(Outer(ByValue()), ["block"], X, until="capture")
    assert any("inner is kept whole, as one node" in note for note in program.notes)


def test_what_was_recorded_in_a_module_that_is_kept_whole_is_forgotten() -> None:
    found = trace(Outer(nn.Sequential(Block(6), ByValue(), Block(6))))
    assert calls(found.graph) == ["block.linear", "inner.0.linear", "inner.1", "inner.2.linear", "head"]
    found.graph.lint()
    nested = trace(Outer(Outer(ByValue())))
    assert [kept.path for kept in nested.kept] == ["inner.inner"]


def test_the_outer_module_is_kept_whole_where_it_fails_itself() -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ByValue()

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.inner(x)
            return h if h.max() > 3 else h + 1

    found = trace(Outer(Wraps()))
    assert [kept.path for kept in found.kept] == ["inner"], "what it holds is not kept a second time"
    assert calls(found.graph) == ["block.linear", "inner", "head"]


def test_a_kept_module_runs_and_branches_as_ever() -> None:
    model = Outer(ByValue())
    module = runnable(compiled(model, ["block"], X, until="capture"))
    for x in (X, -X, 5 * X.abs(), -5 * X.abs()):
        assert torch.equal(module(x)[0], model(x))


def test_an_error_without_a_text_keeps_a_submodule_whole_too() -> None:
    class Asserts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                raise AssertionError
            return x

    found = trace(Outer(Asserts()))
    assert [(kept.path, kept.reason) for kept in found.kept] == [("inner", "AssertionError: ")]


def test_a_submodule_that_depends_on_the_mode_is_kept_whole() -> None:
    model = Outer(ByMode())
    program = compiled(model, ["block"], X, until="capture")
    assert program.capture is not None
    assert [(kept.path, kept.reason) for kept in program.capture.kept] == [
        ("inner", "its forward differs between training and evaluation")
    ]
    module = runnable(program)
    torch.manual_seed(3)
    one = module(X)[0]
    torch.manual_seed(3)
    assert torch.equal(one, model(X))
    model.eval()
    assert torch.equal(module(X)[0], model(X))


def test_a_model_whose_own_forward_needs_a_value_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"torch.fx cannot trace forward: TraceError: .*depends on a tensor's value"):
        trace(ByValue())


def test_a_model_whose_own_forward_depends_on_the_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match="forward itself does something else in training than in evaluation"):
        trace(ByMode())


@pytest.mark.parametrize("inner", [ByValue(), ByMode(), Block(6)])
def test_training_flags_are_put_back(inner: nn.Module) -> None:
    model = Outer(inner)
    model.block.eval()
    trace(model)
    assert [module.training for module in model.modules()] == [
        not (name + ".").startswith("block.") for name, _ in model.named_modules()
    ]


def test_capture_leaves_attributes_buffers_and_random_numbers_alone() -> None:
    model = Stateful()
    state, drawn, python = dict(model.state_dict()), torch.get_rng_state(), random.getstate()
    copies = {name: value.clone() for name, value in state.items()}
    compiled(model, ["linear"], X, until="legalize")
    assert (model.calls, model.seen, model.last) == (0, [], None)
    assert "extra" not in vars(model)
    assert all(torch.equal(value, copies[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert random.getstate() == python


def test_what_runs_under_no_grad_gives_detached_values() -> None:
    model = NoGrad()
    module = runnable(compiled(model, ["first"], X, until="capture"))
    torch.autograd.backward(module(X)[0].square().mean())
    got = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    torch.autograd.backward(model(X).square().mean())
    for one, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_a_tensor_that_nothing_registers_is_one_constant_however_often_it_is_read() -> None:
    model = Constant()
    found = trace(model)
    assert len(found.constants) == 1
    assert next(iter(found.constants.values())) is model.offsets[0]


def test_constants_move_with_the_module_and_are_not_saved() -> None:
    model = Constant()
    net = dnifx.decouple(model, ["linear"], args=(X,))
    assert torch.equal(net(X), model(X))
    assert {key for key in net.state_dict() if not key.startswith("interfaces.")} == set(model.state_dict())
    assert net.double()(X.double()).dtype == torch.float64


def test_a_module_called_twice_is_one_module_with_two_calls() -> None:
    block = Block(6)
    graph = trace(nn.Sequential(block, nn.Tanh(), block)).graph
    assert calls(graph) == ["0.linear", "1", "0.linear"]


def test_a_tied_weight_stays_one_parameter() -> None:
    model = Tied()
    net = dnifx.decouple(model, ["first"], args=(X,))
    assert net.fused.get_submodule("first").weight is net.fused.get_submodule("second").weight is model.first.weight


@pytest.mark.parametrize(
    "name",
    "loss mean original program partitions trainer keys interfaces code graph meta lambda in self held fused".split(),
)
def test_a_child_may_have_a_name_that_the_decoupled_module_uses(name: str) -> None:
    model = mlp(6, 6, 2)
    model._modules = {name if key == "0" else key: module for key, module in model._modules.items()}
    net = dnifx.decouple(model, [name], args=(X,), loss=F.cross_entropy)
    assert torch.equal(net(X), model(X))
    assert set(model.state_dict()) < set(net.state_dict())
    net.trainer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(X, target=torch.tensor([0, 1, 0]))


def test_reads_that_nothing_uses_are_dropped() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.unused = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            torch.numel(self.unused)
            result: Tensor = self.linear(x)
            return result

    graph = captured(compiled(Reads(), ["linear"], X, until="capture"))
    assert all(node.users for node in graph.nodes if node.op == "get_attr")
