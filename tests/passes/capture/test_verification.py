"""Verification: sizes that Python code uses unseen are guarded, those that stay symbolic are not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.ir import Program
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.capture.other_inputs import Size, halved, resized, twice
from dnifx.runtime.emitted.ops import GuardError, guard


class Base(nn.Module):
    """Works with the length of a sequence [batch, length, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.weights = [1.0, 0.5, 0.25, 2.0, 4.0, 0.125]

    def number(self, x: Tensor) -> float | Tensor:
        """Return what the length gives."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.head(torch.tanh(self.body(x) * self.number(x))).mean(1)
        return scores


class ListSlice(Base):
    def number(self, x: Tensor) -> float | Tensor:
        return sum(self.weights[: x.shape[1]])


class ListItem(Base):
    def number(self, x: Tensor) -> float | Tensor:
        return self.weights[x.size(1)]


class Numpy(Base):
    def number(self, x: Tensor) -> float | Tensor:
        return float(np.arange(x.shape[1]).mean())


class SizeNumel(Base):
    def number(self, x: Tensor) -> float | Tensor:
        return 1 / x.shape[1:].numel()


class Symbolic(Base):
    def number(self, x: Tensor) -> float | Tensor:
        return 1 / x.shape[1] + torch.arange(x.shape[1]).sum() / x.shape[1:].__getitem__(0)


def captured(model: nn.Module, *args: Any) -> Program:
    return CaptureGraph(methods=("record",)).run(Program(model, args))


@pytest.mark.parametrize("model", [ListSlice, ListItem, Numpy, SizeNumel])
@pytest.mark.parametrize("length", [2, 4])
def test_a_size_that_no_function_shows_is_guarded(model: type[Base], length: int) -> None:
    torch.manual_seed(0)
    net = dnifx.decouple(model(), "body", args=(torch.randn(2, length, 3),))
    assert net.program.capture is not None
    assert net.program.capture.method == "record"
    assert net.program.capture.guards >= 1
    assert "guard(" in net.code
    for batch, other in ((5, length), (2, length + 1), (3, length), (3, 1)):
        x = torch.randn(batch, other, 3)
        assert torch.equal(net(x), net.original(x)), other
    assert len(net.input_kinds) == 3
    with pytest.raises(GuardError, match=rf"x\.shape.*saw {length} when it was captured and now sees 3"):
        net.fused(torch.randn(2, 3, 3))


def test_a_length_that_is_a_width_too_is_guarded_alone() -> None:
    program = captured(ListSlice(), torch.randn(2, 3, 3))
    assert program.graph is not None
    reads = [node.args[1:] for node in program.graph.nodes if node.target == "size"]
    assert reads == [(1,)]


def test_a_size_that_stays_symbolic_is_not_guarded() -> None:
    program = captured(Symbolic(), torch.randn(2, 4, 3))
    assert program.capture is not None
    assert program.capture.guards == 0
    assert program.graph is not None
    assert not any(node.target is guard for node in program.graph.nodes)


def test_each_input_of_that_size_is_changed_and_guarded() -> None:
    class Two(ListSlice):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            return super().forward(x * mask[..., None])

    x, mask = torch.randn(4, 5, 3, requires_grad=True), torch.ones(4, 5)
    program = captured(Two(), x, mask)
    assert program.capture is not None
    assert program.capture.guards == 2
    args, _ = resized(program, Size(5))
    assert [tuple(each.shape) for each in args] == [(4, 4, 3), (4, 4)]
    assert args[0].requires_grad
    assert [tuple(each.shape) for each in twice(program)[0][0]] == [(8, 5, 3), (8, 5)]


def test_the_batch_is_not_taken_for_another_size() -> None:
    program = Program(ListSlice(), (torch.randn(4, 4, 3),))
    assert [tuple(each.shape) for each in resized(program, Size(4))[0]] == [(4, 3, 3)]
    one = torch.randn(4, 4, 3)
    for choices in (twice, halved):
        for args, _ in choices(Program(ListSlice(), (one, one))):
            assert args[0] is args[1]


def test_sizes_do_not_shrink_where_an_input_may_hold_places_in_them() -> None:
    """Sparse operations read outside of a tensor where an index does not fit it, and may end the process."""
    x, edges = torch.randn(8, 5), torch.tensor([[0, 7], [1, 2]])
    assert halved(Program(ListSlice(), (x, edges))) == []
    assert halved(Program(ListSlice(), (x, torch.tensor([3, 5])))) == [], "lengths of two sequences"
    assert halved(Program(ListSlice(), (x, torch.tensor([[0, 30]])))) != [], "tokens of a vocabulary"
    assert halved(Program(ListSlice(), (x, torch.tensor([[0, 3]])))) != []
    assert halved(Program(ListSlice(), (x, torch.ones(8, dtype=torch.bool)))) != []
    assert [tuple(each.shape) for each in resized(Program(ListSlice(), (x, torch.tensor([4]))), Size(5))[0]] == [
        (8, 6),
        (1,),
    ]
    assert [tuple(each.shape) for each in resized(Program(ListSlice(), (x, torch.tensor([3]))), Size(5))[0]] == [
        (8, 4),
        (1,),
    ]
