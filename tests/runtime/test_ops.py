"""The functions that captured graphs call."""

import ast
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dnifx.runtime.emitted import ops


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Holder:
    value: Any
    name: str = "x"


class Reader:
    def __init__(self, value: Any) -> None:
        self.value = value

    def read(self) -> Any:
        return self.value


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def rebuilt(content: Any, *values: Any, new: tuple[Any, ...]) -> Any:
    template = ops.Template(content, values)
    return template.build(new)


@pytest.mark.parametrize("kind", [list, tuple])
def test_sequences(kind: type) -> None:
    a, b = torch.ones(1), torch.ones(2)
    made = rebuilt(kind([a, 1, [b, a]]), a, b, new=("A", "B"))
    assert made == kind(["A", 1, ["B", "A"]])
    assert type(made) is kind


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_mappings(kind: Any) -> None:
    a = torch.ones(1)
    made = rebuilt(kind([("b", a), ("a", None)]), a, new=("A",))
    assert type(made) is kind
    assert list(made.items()) == [("b", "A"), ("a", None)]


def test_named_tuples_and_dataclasses() -> None:
    a = torch.ones(1)
    made = rebuilt(Pair(Holder(a), (a,)), a, new=("A",))
    assert made == Pair(Holder("A"), ("A",))
    assert type(made.left) is Holder


def test_objects_of_any_class_are_made_anew_and_share_modules() -> None:
    a, module = torch.ones(1), nn.Linear(1, 1)
    holder = Slotted({"tensor": a, "module": module, "list": [1]})
    template = ops.Template(holder, (a,))
    first, second = template.build((torch.zeros(3),)), template.build((torch.zeros(4),))
    assert type(first) is Slotted
    assert first.inner["tensor"].shape == (3,)
    assert second.inner["tensor"].shape == (4,)
    assert first.inner["module"] is module
    assert first.inner["list"] is not second.inner["list"]
    assert holder.inner["tensor"] is a


def test_bound_methods_are_made_anew_around_the_values() -> None:
    a, holder = torch.ones(1), Reader(torch.ones(1))
    holder.value = a
    made = rebuilt([holder.read], a, new=("A",))
    assert made[0]() == "A"
    assert holder.read() is a


def test_closures_are_made_anew_around_the_values() -> None:
    a = torch.ones(2)
    functions = [lambda x: x + a]
    made = rebuilt(lambda x: functions[0](x) * 2, a, new=(torch.full((2,), 5.0),))
    assert torch.equal(made(torch.zeros(2)), torch.full((2,), 10.0))


def test_what_holds_no_value_is_shared() -> None:
    other = [1, 2]
    assert rebuilt([torch.ones(1), other], new=())[1] is other


def test_operators_of_torch_can_be_pickled() -> None:
    for op in (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar, torch.ops.aten.relu.default):
        assert pickle.loads(pickle.dumps(op)) is op


def test_templates_can_be_pickled() -> None:
    a = torch.ones(1)
    template = ops.Template({"x": (a, Holder(a), Slotted(a))}, (a,))
    made = pickle.loads(pickle.dumps(template)).build((torch.zeros(2),))
    assert made["x"][2].inner.shape == (2,)


def test_guards() -> None:
    ops.guard(torch.tensor([1, 2]), [1, 2])
    ops.guard(3, 3)
    ops.guard_length((1, 2), 2)
    with pytest.raises(ops.GuardError, match=r"here: .*saw \[1, 2\] .* now sees \[1, 3\]"):
        ops.guard(torch.tensor([1, 3]), [1, 2], "here")
    with pytest.raises(ops.GuardError, match="captured with 3 pieces, got 2"):
        ops.guard_length((1, 2), 3)


def test_regions() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    assert not ops.under(False, None, "torch.add", x, 1).requires_grad
    assert not ops.under(False, None, ".add", x, 1).requires_grad
    assert ops.under(True, None, torch.add, x, 1).requires_grad
    assert ops.under(True, ("cpu", torch.bfloat16, True), ".matmul", x, x).dtype == torch.bfloat16
    with torch.no_grad():
        assert not ops.under(True, None, "torch.add", x, 1).requires_grad


def test_resolve_finds_functions_by_name() -> None:
    assert ops.resolve("torch.nn.functional.linear") is nn.functional.linear
    assert ops.resolve("builtins.len") is len


def test_small_writes() -> None:
    class Thing:
        size = 0

    x = torch.zeros(3)
    assert ops.set_item(x, 1, 5.0) is x
    assert x.tolist() == [0, 5, 0]
    assert ops.set_attribute(Thing(), "size", 2).size == 2
    assert ops.call(divmod, 7, 2) == (3, 1)


def test_vmapped() -> None:
    def double(row: Tensor) -> Tensor:
        return row * 2

    assert torch.equal(ops.vmapped(double, (0, 1, "error", None), torch.ones(2, 3)), torch.full((3, 2), 2.0))


def test_the_file_needs_torch_and_the_standard_library_alone() -> None:
    tree = ast.parse(Path(ops.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.partition(".")[0] == "dnifx" for name in modules)
