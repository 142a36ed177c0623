"""What Python decides by sizes and values: the smallest model of each construct, recorded with guards or kept whole."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dnifx.passes.capture.comparison import runnable
from dnifx.passes.capture.record.recording import record
from dnifx.runtime.emitted import ops
from dnifx.runtime.emitted.ops import GuardError
from dnifx.runtime.net.input_kinds import SIZES_ALONE
from tests.passes.capture.record.recorded import SizeBranch, Wrapped, holds_for, kept, recorded, run


class DataBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


def test_a_branch_on_computed_values_keeps_the_smallest_module_whole() -> None:
    model = Wrapped(DataBranch())
    recording = recorded(model, torch.randn(3, 4))
    assert kept(recording) == ["inner"]
    assert "test_recording_guards.py" in recording.kept[0].reason
    assert "if x.sum() > 0" in recording.kept[0].reason
    for _ in range(6):
        assert holds_for(recording, model, torch.randn(3, 4))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.linear(x)
        return x if bool(mask.all()) else x * mask[:, None]


def test_a_branch_on_the_inputs_alone_is_guarded() -> None:
    model = Masked()
    full, ragged = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
    recording = recorded(model, torch.randn(3, 4), full)
    assert (kept(recording), recording.guards) == ([], 1)
    with pytest.raises(GuardError, match="saw True when it was captured and now sees False"):
        run(recording, model)(torch.randn(3, 4), ragged)
    other = recorded(model, torch.randn(3, 4), ragged)
    assert not holds_for(other, model, torch.randn(3, 4), full)


def test_a_branch_on_a_size_is_guarded_and_holds_on_its_side() -> None:
    model = SizeBranch()
    recording = recorded(model, torch.randn(2, 4))
    assert holds_for(recording, model, torch.randn(9, 3))
    assert not holds_for(recording, model, torch.randn(2, 6))


class Selected(nn.Module):
    """Asks for the size of what is made of selected rows."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows = self.make(x, mask)
        return rows.sum(0) if len(rows) > 5 else rows.sum(0) * 2


SELECTED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "joined with all": (lambda x, mask: torch.cat([x, x[mask]]), False),
    "all joined with them": (lambda x, mask: torch.cat([x[mask], x]), False),
    "put into all": (lambda x, mask: torch.zeros_like(x).index_put((mask.nonzero()[:, 0],), x[mask]), True),
    "all": (lambda x, mask: x, True),
}


@pytest.mark.parametrize(("make", "alone"), SELECTED.values(), ids=SELECTED.keys())
def test_a_size_that_depends_on_values_is_no_matter_of_sizes_alone(make: Any, alone: bool) -> None:
    model, mask = Selected(make), torch.tensor([True, False, True, False])
    recording = recorded(model, torch.randn(4, 3), mask)
    guards = [node for node in recording.graph.nodes if node.target is ops.guard]
    assert guards
    assert all((SIZES_ALONE in node.meta) is alone for node in guards)
    assert holds_for(recording, model, torch.randn(4, 3), torch.tensor([True, True, False, False]))
    assert alone or not holds_for(recording, model, torch.randn(4, 3), torch.tensor([True, False, False, False]))


class UnrolledOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
        return state


def test_a_loop_over_a_size_is_unrolled_and_guarded() -> None:
    model = UnrolledOverTime()
    recording = recorded(model, torch.randn(2, 4, 3))
    assert sum(node.target == "cell" for node in recording.graph.nodes) == 4
    assert holds_for(recording, model, torch.randn(5, 4, 3))
    assert not holds_for(recording, model, torch.randn(2, 3, 3))


class Pieces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([piece.sum(0) * index for index, piece in enumerate(x.split(2))]).sum(0)  # type: ignore[no-untyped-call]


def test_the_number_of_pieces_is_guarded() -> None:
    model = Pieces()
    recording = recorded(model, torch.randn(4, 3))
    assert holds_for(recording, model, torch.randn(3, 3))
    assert not holds_for(recording, model, torch.randn(6, 3))


class Arithmetic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        half, rest = divmod(length, 2)
        x = x[:, : half * 2].reshape(batch * half, -1) / math.ceil(batch / 2)
        return x.view(batch, half, 2 * width).sum(1) * (1 + rest) + float(width) ** -0.5 + x.numel() // batch  # type: ignore[no-any-return]


def test_arithmetic_on_sizes_stays_symbolic() -> None:
    model = Arithmetic()
    recording = recorded(model, torch.randn(2, 5, 4))
    assert recording.guards == 1  # float(width)
    for batch, length in ((3, 5), (1, 8), (4, 2)):
        assert holds_for(recording, model, torch.randn(batch, length, 4))


def test_strides_stay_symbolic() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows, width = x.size()
            outer, inner = x.stride()
            return x.as_strided((rows, width - 1, 2), (outer, inner, inner)).sum(-1)

    recording = recorded(Windows(), torch.randn(3, 5))
    assert holds_for(recording, Windows(), torch.randn(4, 7))


class Experts(nn.Module):
    """Mixture of experts: every token goes where the router sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = (choice == index).nonzero().flatten()
            if chosen.numel() > 0:
                out[chosen] = expert(x[chosen])
        return out


def test_experts_are_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4), Experts(), nn.Linear(4, 64), nn.Linear(64, 4))
    recording = recorded(model, torch.randn(6, 4))
    assert kept(recording) == ["2"]
    for _ in range(4):
        assert holds_for(recording, model, torch.randn(6, 4))


class Items(nn.Module):
    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        number = count.max().item()
        return x[: int(number)] if number > 0 else x


def test_numbers_read_from_inputs_are_guarded() -> None:
    recording = recorded(Items(), torch.randn(5, 2), torch.tensor([1, 3]))
    assert holds_for(recording, Items(), torch.randn(9, 2), torch.tensor([3, 0]))
    assert not holds_for(recording, Items(), torch.randn(5, 2), torch.tensor([2, 2]))


class Truncated(nn.Module):
    """Takes of a tensor's content what Python makes of it: how often to halve, and whether."""

    def __init__(self, item: bool) -> None:
        super().__init__()
        self.item = item

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        if count:
            for _ in range(int(count.item() if self.item else count)):
                x = x / 2
        return x


@pytest.mark.parametrize("item", [True, False])
def test_a_guard_compares_what_python_made_of_the_content(item: bool) -> None:
    recording = recorded(Truncated(item), torch.randn(2), torch.tensor(2.7))
    assert holds_for(recording, Truncated(item), torch.randn(2), torch.tensor(2.2))
    assert not holds_for(recording, Truncated(item), torch.randn(2), torch.tensor(3.2))
    assert not holds_for(recording, Truncated(item), torch.randn(2), torch.tensor(0.0))


class ReadAfterWrite(nn.Module):
    """Reads a view before and after its base is written."""

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        held = x.new_zeros(3)
        view = held[0]
        before = int(view)
        held.add_(count)
        return x * (before + int(view))


def test_a_guard_reads_a_tensor_when_the_model_did() -> None:
    recording = recorded(ReadAfterWrite(), torch.randn(2), torch.tensor(0.0))
    assert not holds_for(recording, ReadAfterWrite(), torch.randn(2), torch.tensor(2.0))


class FloatOfNaN(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (0.0 if float(weight) != float(weight) else 1.0)


def test_a_guard_on_a_value_that_is_no_number_holds_for_it() -> None:
    recording = recorded(FloatOfNaN(), torch.randn(2), torch.tensor(math.nan))
    assert not holds_for(recording, FloatOfNaN(), torch.randn(2), torch.tensor(1.0))


class Symbolic(nn.Module):
    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        return torch.arange(count.item()).sum() + x


def test_a_number_read_from_inputs_stays_symbolic_where_it_can() -> None:
    recording = recorded(Symbolic(), torch.randn(2), torch.tensor(3))
    assert holds_for(recording, Symbolic(), torch.randn(2), torch.tensor(7))


class Sizes(nn.Module):
    """A leaf that gives numbers beside tensors, as vision backbones do."""

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        return x.flatten(1), x.shape[1], x.shape[2]


class UsesSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = Sizes()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        flat, height, width = self.sizes(x)
        return flat.view(-1, width, height) * self.scale  # type: ignore[no-any-return]


def test_numbers_from_a_module_kept_whole_stay_symbolic() -> None:
    model = UsesSizes()
    recording = record(model, (torch.randn(2, 3, 4),), {}, keep_whole=("sizes",))
    assert holds_for(recording, model, torch.randn(3, 5, 6))


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            bias = x.mean(0).softmax(0)
        y = torch.zeros(x.shape[0], 4)
        y[:, 0] = self.linear(x).sum(1)
        return sum(piece for piece in torch.split(y, 1, dim=1)) + bias * (x.shape[0] // 2)


def test_a_graph_with_guards_and_regions_compiles_whole() -> None:
    model, x = Compiled(), torch.randn(6, 4)
    recording = recorded(model, x)
    assert recording.guards > 0
    compiled = torch.compile(runnable(model, recording), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x)[0], model(x))


def test_a_guard_in_a_module_of_torch_names_its_line() -> None:
    model, labels = nn.AdaptiveLogSoftmaxWithLoss(16, 10, [3, 6], div_value=2), torch.tensor([0, 1, 2, 4, 5, 9])
    recording = recorded(model, torch.randn(6, 16), labels)
    guards = [node.args for node in recording.graph.nodes if "guard" in str(node.target)]
    assert guards
    assert all("adaptive.py:" in str(each) for each in guards)


@pytest.mark.parametrize("target", [ops.guard, ops.guard_length, ops.call_anew, ops.set_item, ops.set_attribute])
def test_what_acts_by_its_effect_is_no_dead_code(target: Any) -> None:
    graph = fx.Graph()
    graph.call_function(target, (graph.placeholder("x"),))
    graph.output(())
    graph.eliminate_dead_code()
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]
