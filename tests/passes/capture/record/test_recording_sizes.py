"""Symbolic numbers behave as the numbers they stand for, and compute to them from the graph."""

import copy
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from dnifx.passes.capture.comparison import replay
from dnifx.passes.capture.record.recording import record
from dnifx.passes.capture.record.sizes import Number, SymbolicFloat, SymbolicInt, plain, symbolic
from dnifx.runtime.emitted.ops import GuardError


class Listener:
    """Hears what Python does with numbers."""

    def __init__(self) -> None:
        self.active = True
        self.heard: list[Any] = []

    def compared(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> None:
        self.heard.append((function.__name__, value))

    def consumed(self, number: Number) -> None:
        self.heard.append(plain(number))

    def formatted(self, number: Number) -> None:
        self.heard.append(f"text of {plain(number)}")


def number(value: float, listener: Listener | None = None) -> Any:
    return symbolic(value, listener or Listener(), None, (None, 0, "size"), False)


OPERATIONS = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.truediv)


@given(st.integers(0, 50), st.integers(-9, 9), st.sampled_from(OPERATIONS), st.booleans())
def test_arithmetic_is_that_of_numbers(
    left: int, right: int, function: Callable[[Any, Any], Any], swapped: bool
) -> None:
    symbol = number(left)
    operands = (right, symbol) if swapped else (symbol, right)
    plain_operands = (right, left) if swapped else (left, right)
    assume(plain_operands[1] != 0)
    result = function(*operands)
    assert plain(result) == function(*plain_operands)
    assert type(plain(result)) is type(function(*plain_operands))
    assert isinstance(result, SymbolicInt | SymbolicFloat)


@pytest.mark.parametrize("function", [operator.neg, abs, math.ceil, math.floor, round])
def test_functions_of_one_number(function: Callable[[Any], Any]) -> None:
    assert isinstance(function(number(7)), SymbolicInt)
    assert plain(function(number(7) / 2)) == function(3.5)


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
def test_comparisons_are_heard(name: str) -> None:
    listener = Listener()
    function = getattr(operator, name)
    assert function(number(3, listener), 4) is function(3, 4)
    assert listener.heard == [(name, function(3, 4))]


def test_truth_and_conversions_are_heard() -> None:
    listener = Listener()
    assert number(3, listener)
    assert int(number(4, listener)) == 4
    assert math.sqrt(number(9, listener)) == 3
    assert [0] * number(2, listener) == [0, 0]
    assert listener.heard == [("truth", True), 4, 9, 2]


def test_an_idle_owner_hears_nothing() -> None:
    listener = Listener()
    symbol = number(3, listener)
    listener.active = False
    assert type(symbol + 1) is int
    assert symbol > 1
    assert listener.heard == []


def test_copies_and_pickles_are_plain() -> None:
    for made in (copy.copy(number(3)), copy.deepcopy([number(3)])[0], pickle.loads(pickle.dumps(number(3)))):
        assert type(made) is int
    assert plain([(number(3),), {"a": number(2.5)}]) == [(3,), {"a": 2.5}]
    assert type(plain([number(3)])[0]) is int


def test_it_serves_as_a_key() -> None:
    assert {3: "three"}[number(3)] == "three"
    assert f"{number(3)}" == "3"
    assert isinstance(number(3), int)


class Formula(nn.Module):
    """Fills a vector as long as a formula of the sizes says."""

    def __init__(self, steps: list[tuple[Callable[[Any, Any], Any], int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        total: Any = x.shape[0]
        for function, constant in self.steps:
            total = function(total, constant if constant > 0 else x.shape[1])
        return torch.full((3,), total)


FORMULAS = st.lists(
    st.tuples(st.sampled_from((operator.add, operator.mul, operator.floordiv)), st.integers(0, 4)), max_size=6
)


@given(FORMULAS, st.integers(1, 6), st.integers(1, 6))
def test_formulas_hold_for_other_sizes(
    steps: list[tuple[Callable[[Any, Any], Any], int]], rows: int, columns: int
) -> None:
    model = Formula(steps)
    recording = record(model, (torch.zeros(4, 3),), {})
    run = replay(model, recording)
    x = torch.zeros(rows, columns)
    assert torch.equal(run(x), model(x))
    assert recording.guards == 0


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        total = x.sum()
        for index in range(1, x.shape[0], 2):
            total = total + index
        return total


def test_a_range_over_a_size_is_a_guard() -> None:
    recording = record(Loop(), (torch.zeros(5),), {})
    run = replay(Loop(), recording)
    assert float(run(torch.zeros(5))) == 4
    with pytest.raises(GuardError, match=r"range\(1, x.shape\[0\], 2\).*saw 5 when it was captured and now sees 6"):
        run(torch.zeros(6))


def test_builtins_are_put_back() -> None:
    before = (len, range, nn.Module.__call__, torch.autocast.__enter__)
    record(Loop(), (torch.zeros(5),), {})
    assert before == (len, range, nn.Module.__call__, torch.autocast.__enter__)
    assert type(range(3)) is range
