"""In-place writes across cuts: which get a clone, which are refused, and that all values stay the same."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import dnifx
from dnifx.errors import LegalizeError
from dnifx.ir import Program
from dnifx.passes.graph import captured
from tests.passes.programs import compiled, runnable

X = torch.randn(3, 6)


class Net(nn.Module):
    """Four layers that a function puts together."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.register_buffer("memory", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def entering(net: Net, x: Tensor) -> Tensor:
    """A value is written where it arrives, and nobody else reads it."""
    h = net.a(x)
    h.mul_(2)
    out: Tensor = net.b(h)
    return out


def entering_activation(net: Net, x: Tensor) -> Tensor:
    """The common one: an in-place activation behind the cut."""
    out: Tensor = net.b(torch.relu_(net.a(x)))
    return out


def early(net: Net, x: Tensor) -> Tensor:
    """A reader in a later partition precedes the producer's own write."""
    h = torch.sigmoid(net.a(x)) + 0
    g = net.b(h * 1)
    h.mul_(3)
    out: Tensor = net.c(g) + h
    return out


def earlier_reader(net: Net, x: Tensor) -> Tensor:
    """Behind the cut one branch reads the value before another one writes it."""
    h = net.a(x)
    before = h * 2
    h.add_(1)
    out: Tensor = net.b(h) + before
    return out


def through_a_view(net: Net, x: Tensor) -> Tensor:
    """A view that is made behind the cut is written."""
    h = net.a(x)
    h[:, :3].mul_(2)
    out: Tensor = net.b(h)
    return out


def view_made_before(net: Net, x: Tensor) -> Tensor:
    """A view crosses and is written, and the whole is not read any more."""
    h = net.a(x).view(-1)
    out: Tensor = net.b(h.mul_(2).view(3, 6))
    return out


def twice(net: Net, x: Tensor) -> Tensor:
    """Two writes to one arriving value."""
    h = net.a(x)
    h.mul_(2)
    h.add_(1)
    out: Tensor = net.b(h)
    return out


def buffered(net: Net, x: Tensor) -> Tensor:
    """A buffer takes in what crossed, detached."""
    h = net.a(x)
    with torch.no_grad():
        net.get_buffer("memory").mul_(0.9).add_(h.mean(0))
    out: Tensor = net.b(h)
    return out


def buffered_twice(net: Net, x: Tensor) -> Tensor:
    """A buffer is written before the cut and behind it, and read behind it."""
    with torch.no_grad():
        net.get_buffer("memory").mul_(0.9).add_(1)
    h = torch.relu(net.a(x) + net.get_buffer("memory"))
    with torch.no_grad():
        net.get_buffer("memory").add_(h.mean(0))
    out: Tensor = net.b(h + net.get_buffer("memory"))
    return out


MENDED = {
    "entering": (entering, ["a"]),
    "activation": (entering_activation, ["a"]),
    "earlier reader": (earlier_reader, ["a"]),
    "through a view": (through_a_view, ["a"]),
    "view made before": (view_made_before, ["view"]),
    "twice": (twice, ["a"]),
    "early": (early, ["add"]),
    "buffered": (buffered, ["a"]),
    "buffered twice": (buffered_twice, ["relu"]),
    "buffered twice, cut early": (buffered_twice, ["a"]),
}


def late(net: Net, x: Tensor) -> Tensor:
    """A third partition reads the whole after the second one wrote a part of it."""
    h = net.a(x)
    part = h[:, :3].mul_(2)
    g = net.b(torch.cat((part, part), 1))
    out: Tensor = net.c(g) + h
    return out


def several(net: Net, x: Tensor) -> Tensor:
    """Memory crosses as two values, and one of them is written."""
    h = net.a(x)
    left, right = h[:, :3], h[:, 3:]
    left.mul_(2)
    out: Tensor = net.b(torch.cat((left, right), 1))
    return out


def clones(program: Program) -> list[fx.Node]:
    return [node for node in captured(program).nodes if node.target is torch.clone]


@pytest.mark.parametrize("case", MENDED)
def test_what_is_mended_computes_the_same(case: str) -> None:
    function, cuts = MENDED[case]
    model = Net(function)
    expected = copy.deepcopy(model)
    net = dnifx.decouple(model, cuts, args=(X,), gradient="oracle")
    assert len(net.partitions) > 1
    for _ in range(2):
        assert torch.equal(net(X), expected(X))
    torch.autograd.backward([net(X).square().mean(), expected(X).square().mean()])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(model.get_buffer("memory"), expected.get_buffer("memory"))


@pytest.mark.parametrize("case", MENDED)
def test_the_partitions_of_what_is_mended_run_in_their_order(case: str) -> None:
    function, cuts = MENDED[case]
    model = Net(function)
    expected = copy.deepcopy(model)(X)
    program = compiled(model, cuts, X, gradient="zero")
    values = {"x": X}
    outputs: tuple[Tensor, ...] = ()
    for partition, graph in zip(program.partitions, program.submodules, strict=True):
        module = runnable(Program(model, graph=graph))
        outputs = module(*(values[name].detach() for name in partition.inputs))
        values.update(zip(partition.outputs, outputs, strict=False))
    assert torch.equal(outputs[0], expected)


def test_a_write_to_what_arrives_works_on_a_clone_and_says_so() -> None:
    program = compiled(Net(entering), ["a"], X, until="legalize")
    (clone,) = clones(program)
    assert program.partition_of[clone.name] == 1
    assert clone.name == "a_clone"
    assert "submod_1 takes a clone of a, since mul_ writes to it in place" in program.notes
    assert program.boundaries[0].values == ("a",)
    assert program.measures[clone.name].tensors == program.measures["a"].tensors


def test_nothing_is_cloned_where_a_write_stays_at_home() -> None:
    program = compiled(Net(entering), ["mul_"], X, until="legalize")
    assert clones(program) == []
    assert program.boundaries[0].values == ("mul_",)


def test_the_original_graph_is_left_alone() -> None:
    before = compiled(Net(entering), ["a"], X, until="partition")
    text = str(before.graph)
    compiled(before.model, ["a"], X, until="legalize")
    assert str(before.graph) == text


def test_memory_that_crosses_as_several_values_is_refused_where_one_is_written() -> None:
    with pytest.raises(LegalizeError) as caught:
        compiled(Net(several), ["getitem", "getitem_1"], X, until="legalize")
    assert "mul_ in module '<root>' (submod_1) writes in place to memory that crosses the cut as several values" in str(
        caught.value
    )
    assert "(getitem, getitem_1)" in str(caught.value)
    assert "make the write out of place, or cut so that they are made in the same partition" in str(caught.value)


def test_a_write_that_a_later_partition_has_to_see_is_refused() -> None:
    with pytest.raises(
        LegalizeError, match=r"mul_ in module '<root>' \(submod_1\) writes in place to (a|getitem), which add in"
    ):
        compiled(Net(late), ["a", "b"], X, until="legalize")


def test_a_refusal_names_the_module_that_writes() -> None:
    class Writes(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0].mul_(2) + pair[1]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.writes, self.b = nn.Linear(6, 6), Writes(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            result: Tensor = self.b(self.writes((h[:, :3], h[:, 3:])))
            return result

    with pytest.raises(LegalizeError, match="mul_ in module 'writes'"):
        compiled(Model(), ["getitem", "getitem_1"], X, until="legalize")
