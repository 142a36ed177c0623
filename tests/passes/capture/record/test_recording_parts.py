"""The parts of the recorder: the plan of what to open, model state, walks over objects, names of functions."""

import operator
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dnifx.passes.capture.comparison import Outcome, compare, same
from dnifx.passes.capture.record import functions
from dnifx.passes.capture.record.generators import python_draws, seed
from dnifx.passes.capture.record.hazards import error_line
from dnifx.passes.capture.record.plan import Plan, ancestry, large_modules
from dnifx.passes.capture.record.state import Snapshot, preserved
from dnifx.passes.capture.record.structure import path_name, tensors_in, variables_in, walk
from dnifx.runtime.emitted import ops


def test_ancestry() -> None:
    assert ancestry("a.b.c") == ["", "a", "a.b", "a.b.c"]
    assert ancestry("") == [""]


def test_large_modules_hold_most_of_the_model() -> None:
    body = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(8, 2)))
    assert large_modules(model) == ["", "body"]


@pytest.mark.parametrize(
    ("path", "module", "leaf"),
    [
        ("", nn.Sequential(), False),
        ("a", nn.Sequential(), False),
        ("a.b", nn.Linear(1, 1), True),
        ("other", nn.Sequential(), True),
        ("leak", nn.Linear(1, 1), False),
        ("leak.below", nn.Sequential(), False),
        ("whole", nn.Sequential(), True),
    ],
)
def test_what_is_a_leaf(path: str, module: nn.Module, leaf: bool) -> None:
    plan = Plan.start(nn.Sequential(), ("a.b", "whole"), ("whole",)).revised({}, {"leak"})
    assert plan.is_leaf(path, module) == leaf


def test_a_leak_is_opened_even_where_it_was_to_be_kept_whole() -> None:
    plan = Plan.start(nn.Sequential(), None, ()).revised({"a": "reason"}, ())
    assert plan.is_leaf("a", nn.Sequential())
    assert not plan.revised({}, {"a"}).is_leaf("a", nn.Sequential())


class Stateful(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))
        self.weight = nn.Parameter(torch.ones(2))
        self.count = 0
        self.seen: list[int] = []


def test_a_snapshot_puts_everything_back() -> None:
    model = Stateful()
    total = model.total
    seed(0)
    with preserved(model) as snapshot, snapshot.watching(), torch.no_grad():
        model.total.add_(1)
        model.total = torch.ones(3)
        model.weight.mul_(3)
        model.weight.data.add_(1)
        model.register_buffer("later", torch.ones(1), persistent=False)
        model.count, model.seen[:], model.extra = 5, [1], torch.ones(1)
        model.eval()
        drawn = torch.rand(1)
    assert model.total is total
    assert model.total.tolist() == [0, 0]
    assert model.weight.tolist() == [1, 1]
    assert list(model._buffers) == ["total"]
    assert (model.count, model.seen, model.training) == (0, [], True)
    assert "extra" not in vars(model)
    assert torch.equal(torch.rand(1), drawn)


def test_parameters_are_copied_only_where_they_are_written() -> None:
    first = nn.Linear(2, 2)
    model = nn.Sequential(first, nn.Linear(2, 2))
    snapshot = Snapshot(model)
    with snapshot.watching(), torch.no_grad():
        first.weight.add_(1)
        model(torch.ones(1, 2))
    assert len(snapshot._written) == 1


def test_draws_of_python_and_numpy_are_noticed() -> None:
    import random

    import numpy as np

    mark = python_draws()
    assert python_draws() == mark
    random.random()
    assert python_draws() != mark
    mark = python_draws()
    np.random.rand(1)
    assert python_draws() != mark


class Colour(Enum):
    RED = 1


def test_walks() -> None:
    a, b = torch.ones(1), torch.ones(2)
    tangled: dict[str, Any] = {"x": [a, (b, a)], "kind": Colour.RED, "none": None}
    tangled["self"] = tangled
    assert [(path_name(path), tensor.numel()) for path, tensor in tensors_in(tangled)] == [("x_0", 1), ("x_1_0", 2)]
    assert len(variables_in(lambda: a)) == 1
    assert tensors_in(lambda: a) == []
    assert ((("item", "kind"),), Colour.RED) in list(walk(tangled))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.add, "torch.add"),
        (torch.nn.functional.linear, "torch._C._nn.linear"),
        (torch.nn.functional.softmax, "torch.nn.functional.softmax"),
        (operator.getitem, "_operator.getitem"),
        (lambda x: x, None),
    ],
)
def test_dotted_names(function: Callable[..., Any], name: str | None) -> None:
    assert functions.dotted_name(function) == name
    assert functions.is_importable(function) == (name is not None)
    assert name is None or ops.resolve(name) is function


@pytest.mark.parametrize(
    ("name", "kwargs", "writes"),
    [
        ("add_", {}, True),
        ("add", {}, False),
        ("__iadd__", {}, True),
        ("__add__", {}, False),
        ("relu", {"inplace": True}, True),
        ("add", {"out": 1}, True),
        ("__setitem__", {}, True),
    ],
)
def test_which_functions_write(name: str, kwargs: dict[str, Any], writes: bool) -> None:
    assert functions.writes(name, kwargs) == writes


def test_guards_survive_dead_code_elimination() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(ops.guard, (x, 1))
    graph.call_function(torch.add, (x, 1))
    graph.output((x,))
    graph.eliminate_dead_code()
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [ops.guard]


def test_error_line_names_the_source() -> None:
    with pytest.raises(ValueError, match="no") as caught:
        raise ValueError("no")
    assert error_line(caught.value).startswith("test_recording_parts.py:")
    assert 'raise ValueError("no")' in error_line(caught.value)


def test_values_are_compared_bit_for_bit() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same(nan, nan.clone())
    assert not same(nan, torch.tensor([0.0, 1.0]))
    assert not same(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not same(torch.ones(2), None)
    found = compare(Outcome({"a": torch.ones(1), "b": 1}, "Tensor"), Outcome({"a": torch.zeros(1), "b": 2}, "tuple"))
    assert [text.partition(" ")[0] for text in found] == ["the", "a", "b"]


def test_a_container_that_is_held_twice_is_walked_twice_where_the_structure_counts() -> None:
    shared = [torch.ones(1)]
    found = dict(walk({"one": shared, "two": shared}, whole=True))
    assert list(found) == [(("item", "one"), ("item", 0)), (("item", "two"), ("item", 0))]
    assert str(found[("item", "two"), ("item", 0)]).startswith("the same object as ")
    assert len(dict(walk({"one": shared, "two": shared}))) == 1
