"""Every form of cuts=, and the errors for wrong ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import dnifx
from dnifx.errors import CutError
from dnifx.ir import Program
from dnifx.passes.cuts.resolve import glob_matches, modules_to_open
from tests.passes.programs import Block, Residual, compiled, mlp

X = torch.randn(3, 6)


class Nested(nn.Module):
    """``stages.<i>.<j>`` blocks, a block called twice, a tuple, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Block(6), Block(6)), nn.Sequential(Block(6))])
        self.again = Block(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        left, right = torch.chunk(self.again(self.again(x)), 2, 1)
        result: Tensor = self.head(torch.cat((right, left), 1))
        return result


def resolved(cuts: Any, model: nn.Module | None = None) -> dict[str, tuple[str, ...]]:
    program: Program = compiled(model or Nested(), cuts, X, until="cuts")
    return {cut.name: cut.nodes for cut in program.cuts}


@pytest.mark.parametrize(
    ("cuts", "names"),
    [
        ("stages.0", ["stages.0"]),
        (["stages.0.1", "again"], ["stages.0.1", "again"]),
        ("stages", ["stages"]),
        (["stages", "again"], ["stages", "again"]),
        ("stages.*", ["stages.0", "stages.1"]),
        ("stages.*.*", ["stages.0.0", "stages.0.1", "stages.1.0"]),
        ("stages.?.0", ["stages.0.0", "stages.1.0"]),
        ("stages.[!1].*", ["stages.0.0", "stages.0.1"]),
        (
            "stages.**",
            ["stages.0", "stages.0.0", "stages.0.0.linear", "stages.0.1.linear", "stages.1", "stages.1.0.linear"],
        ),
        ("again@1", ["again@1"]),
        (["again", "again@1"], ["again", "again@1"]),
        ("relu_1", ["relu_1"]),
        (["stages.1", "relu_2", "stages.1"], ["stages.1"]),
        (("stages.0",), ["stages.0"]),
    ],
)
def test_names_and_globs(cuts: Any, names: list[str]) -> None:
    found = resolved(cuts)
    assert set(found) >= set(names) if cuts == "stages.**" else list(found) == names


def test_cuts_of_one_name_are_numbered() -> None:
    assert list(resolved(lambda node: node.target == "again.linear")) == ["again.linear", "again.linear@1"]


def test_a_module_is_cut_after_the_values_that_leave_it() -> None:
    assert resolved(["stages.0", "again@1"]) == {"stages.0": ("relu_1",), "again@1": ("relu_4",)}


def test_a_container_that_is_not_called_itself_is_cut_after_all_that_it_holds() -> None:
    assert resolved("stages") == {"stages": ("relu_2",)}
    assert [str(edge) for edge in compiled(Nested(), ["stages->again"], X, until="cuts").cuts[0].edges] == [
        "relu_2 -> again_linear"
    ]
    assert resolved(["s*"]) == {"stages": ("relu_2",)}


def test_a_tuple_is_cut_after_its_items() -> None:
    assert resolved("chunk") == {"chunk": ("getitem", "getitem_1")}


def test_a_callable_chooses_nodes() -> None:
    def relus(node: fx.Node) -> bool:
        return node.target is torch.relu

    assert len(resolved(relus)) == 5


def test_a_callable_that_chooses_nothing_is_named() -> None:
    def nothing(node: fx.Node) -> bool:
        return False

    with pytest.raises(CutError, match=r"the callable cuts='nothing' chose no node of Nested"):
        resolved(nothing)


def test_the_callable_sees_computing_nodes_alone() -> None:
    seen: list[str] = []

    def relu(node: fx.Node) -> bool:
        seen.append(node.op)
        return node.name == "relu"

    resolved(relu)
    assert set(seen) <= {"call_module", "call_function", "call_method"}


def test_each_cuts_after_every_parametrised_block() -> None:
    assert list(resolved("each")) == ["stages.0.0", "stages.0.1", "stages.1.0", "again", "again@1"]
    assert resolved("each", mlp(6, 6, 6, 2, batch_norm=True)) == {"0": ("_2",), "3": ("_5",)}


def test_a_cut_with_nothing_behind_it_is_left_out_with_a_note() -> None:
    program = compiled(mlp(6, 6, 2), "each", X, until="cuts")
    assert [cut.name for cut in program.cuts] == ["0"]
    assert program.notes[-1] == "no cut after 2: only the model's output lies behind it"
    with pytest.raises(
        CutError, match="cuts='2' leaves nothing behind the cut: its values are the model's output; cut earlier"
    ):
        resolved("2", mlp(6, 6, 2))


@pytest.mark.parametrize("cuts", [["0", "2"], ("2", "0"), ["*", "2"]])
def test_a_cut_by_name_with_nothing_behind_it_is_an_error(cuts: Any) -> None:
    with pytest.raises(
        CutError, match="leaves nothing behind the cut '2': its values are the model's output; cut earlier"
    ):
        resolved(cuts, mlp(6, 6, 2))
    assert list(resolved("*", mlp(6, 6, 2))) == ["0", "1"]


@pytest.mark.parametrize("form", [dnifx.Edge("stages.0", "stages.1"), "stages.0 -> stages.1", "stages.0->stages.1"])
def test_an_edge_by_value_and_in_words(form: Any) -> None:
    program = compiled(Nested(), [form], X, until="cuts")
    assert [[str(edge) for edge in cut.edges] for cut in program.cuts] == [["relu_1 -> stages_1_0_linear"]]
    assert program.cuts[0].name == "stages.0 -> stages.1"


@pytest.mark.parametrize(
    ("cuts", "text"),
    [
        ("stage.0", r"no cut 'stage.0'.*'stages.0'"),
        ("stages.9", r"no cut 'stages.9'.*'stages.[01]'"),
        ("heads.*", r"no cut 'heads.\*'"),
        (["stages.0", "nowhere"], r"no cut 'nowhere'"),
        (
            dnifx.Edge("stages.0", "head"),
            r"no edge stages.0 -> head: the result of 'stages.0' goes to '\w+', not to 'head'",
        ),
        (dnifx.Edge("stage", "head"), r"no cut 'stage'"),
        ([], r"cuts=\[\] asks for no cut; name a module of Nested, for example"),
        (3.5, r"cuts=3.5 is a float; give module paths, globs, edges, a callable, 'each' or a number"),
        (True, r"cuts=True is a bool"),
        (None, r"cuts= is None; give module paths"),
        ([3], r"cuts= holds 3, a int; give names and dnifx.Edge"),
        ("stages.[", r"'stages.\[' is no pattern for names \(.*\); write \*, \*\*, \? and \[...\]"),
    ],
)
def test_a_wrong_cut_says_what_there_is(cuts: Any, text: str) -> None:
    with pytest.raises(CutError, match=f"(?s){text}"):
        dnifx.decouple(Nested(), cuts, args=(X,))


class Functional(nn.Module):
    """Writes its activations as functions; its last layer is a function of a parameter, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.weight = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(functional.relu(self.one(x)))
        return functional.linear(self.two(h), self.weight)


def test_a_block_includes_the_functions_without_parameters_that_follow_it() -> None:
    assert resolved("each", Functional()) == {"one": ("tanh",), "two": ("two",)}


def test_each_needs_a_block_with_parameters() -> None:
    with pytest.raises(CutError, match="cuts='each' finds no block with parameters in Sequential"):
        resolved("each", nn.Sequential(nn.ReLU(), nn.Tanh()))


def test_a_cut_inside_a_module_that_is_kept_whole_names_it() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.inner(x)
            return h if h.sum() > 0 else -h

    with pytest.raises(
        CutError, match=r"no cut '0.inner': it lies inside '0', which is kept whole .*; cut after '0' instead"
    ):
        resolved("0.inner", nn.Sequential(Opaque(), nn.Linear(6, 2)))


def test_a_module_that_is_never_called_is_no_place() -> None:
    model = Residual()
    model.spare = nn.Linear(6, 6)
    with pytest.raises(
        CutError, match=r"no cut 'spare': .* does not call it for these inputs in training mode; give an example"
    ):
        resolved("spare", model)


def test_a_module_that_the_output_does_not_need_is_no_place() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.spare, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)
            self.idle = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            self.idle(self.spare(h))
            result: Tensor = self.last(h)
            return result

    model = Idle()
    for cut in ("idle", "last@1"):
        with pytest.raises(CutError, match=rf"no cut '{cut}': the forward of Idle calls that module, but"):
            resolved(cut, model)
    assert not model.idle._forward_hooks
    counted = model.spare.num_batches_tracked
    assert counted is not None
    assert int(counted) == 0


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.**", "a.b.c", True),
        ("**", "a.b", True),
        ("a.?", "a.10", False),
        ("a.[0-3]", "a.2", True),
        ("a.[!0-3]", "a.2", False),
        ("a+b", "aab", False),
        ("a.b", "axb", False),
    ],
)
def test_globs_match_segment_by_segment(pattern: str, path: str, matches: bool) -> None:
    assert glob_matches(pattern, path) is matches


@pytest.mark.parametrize(
    ("cuts", "opened"),
    [
        ("stages.0", ("stages",)),
        ("again@1", ()),
        ("stages.0.1@1", ("stages.0",)),
        (["stages.0.1", "stages.1.*"], ("stages.0", "stages.1")),
        ("stages.0.0 -> stages.1.0", ("stages.0", "stages.1")),
        ("relu_1", None),
        ("each", None),
        (3, None),
    ],
)
def test_only_modules_around_the_cuts_are_opened(cuts: Any, opened: tuple[str, ...] | None) -> None:
    assert modules_to_open(Nested(), cuts) == opened


def test_every_call_of_a_layer_is_numbered() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(6, 6), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(self.act(self.linear(self.act(self.linear(self.act(x))))))
            return out

    model = Thrice()
    assert resolved(["act", "act@1", "act@2"], model) == {"act": ("act",), "act@1": ("act_1",), "act@2": ("act_2",)}
    assert list(resolved(lambda node: node.target == "act", model)) == ["act", "act@1", "act@2"]


def test_each_block_is_cut_whatever_it_is_called() -> None:
    class Letters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.e, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)  # letters of "each"

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(torch.tanh(self.e(torch.relu(self.a(x)))))
            return out

    assert list(resolved("each", Letters())) == ["a", "e"], (
        "nothing lies behind the last one, and nobody asked for it by name"
    )
