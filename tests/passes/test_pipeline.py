"""The pipeline: order, contracts, errors that name the place, one callback."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import dnifx
from dnifx.errors import CaptureError, CutError, PassError
from dnifx.ir import Program
from dnifx.passes.cuts.resolve import ResolveCuts
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import Event, Pass, run_passes
from tests.passes.programs import SYMBOLIC, every_pass, mlp

NAMES = ["capture", "measure", "cuts", "partition", "legalize", "insert", "split", "schedule", "emit", "loss_scale"]


@dataclass(frozen=True)
class Note(Pass):
    """Adds a note; keeps, breaks or forgets its contract as it is told."""

    text: str = "noted"
    mode: str = "well"
    times: tuple[int, ...] = ()
    name: ClassVar[str] = "note"
    requires: ClassVar[tuple[str, ...]] = ("graph",)
    ensures: ClassVar[tuple[str, ...]] = ("notes",)

    def run(self, program: Program) -> Program:
        if self.mode == "fails":
            raise ZeroDivisionError("by zero")
        if self.mode == "refuses":
            raise CutError("no such place")
        return program if self.mode == "forgets" else replace(program, notes=(self.text,))

    def check(self, program: Program) -> None:
        if self.mode == "faulty":
            raise RuntimeError("a node is not in the graph")


def program() -> Program:
    return Program(mlp(4, 4, 2), (torch.randn(3, 4),))


def test_the_passes_run_in_order_and_the_callback_hears_of_each() -> None:
    events: list[Event] = []
    net = dnifx.decouple(mlp(4, 4, 2), ["0"], args=(torch.randn(3, 4),), callback=events.append)
    assert [event.name for event in events] == NAMES
    assert events[-1].program is net.program
    assert all(event.seconds >= 0 for event in events)
    assert events[0].program.measures == {}, "an earlier program is not changed by later passes"


def test_a_pass_returns_a_new_program_and_leaves_the_old_one() -> None:
    start = program()
    end = run_passes(start, every_pass(["0"]))
    assert start.graph is None
    assert start.partitions == ()
    assert end.model is start.model


def test_passes_do_not_change_the_graph_of_an_earlier_program() -> None:
    captured = run_passes(program(), [SYMBOLIC])
    text = str(captured.graph)
    run_passes(captured, every_pass(["0"])[1:])
    assert str(captured.graph) == text


def test_what_a_pass_requires_is_demanded_before_it_runs() -> None:
    with pytest.raises(PassError, match=r"pass 'note' \(after: none\) requires program.graph, which is empty"):
        run_passes(program(), [Note(mode="fails")])


def test_what_a_pass_ensures_is_demanded_of_its_result() -> None:
    with pytest.raises(PassError, match=r"'note' \(after: capture, measure\) ensures program.notes, which is empty"):
        run_passes(program(), [SYMBOLIC, MeasureNodes(), Note(mode="forgets")])


def test_an_unexpected_error_names_the_pass_and_those_before_and_keeps_its_cause() -> None:
    with pytest.raises(PassError, match=r"'note' \(after: capture\) failed: ZeroDivisionError: by zero") as caught:
        run_passes(program(), [SYMBOLIC, Note(mode="fails")])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_what_a_check_finds_names_the_pass() -> None:
    with pytest.raises(PassError, match=r"'note' \(after: capture\) gave a faulty result: a node is not in the graph"):
        run_passes(program(), [SYMBOLIC, Note(mode="faulty")])


def test_a_refusal_comes_through_as_it_is() -> None:
    with pytest.raises(CutError, match=r"^no such place$"):
        run_passes(program(), [SYMBOLIC, Note(mode="refuses")])


def test_the_callback_hears_nothing_of_a_pass_that_failed() -> None:
    heard: list[str] = []
    with pytest.raises(PassError):
        run_passes(program(), [SYMBOLIC, Note(mode="faulty")], lambda event: heard.append(event.name))
    assert heard == ["capture"]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Note(), "note"),
        (Note(text="x"), "note{text='x'}"),
        (Note(mode="well", times=(1, 2)), "note{times=(1, 2)}"),
        (ResolveCuts(4), "cuts{cuts=4}"),
        (ResolveCuts("each", slack=0.5), "cuts{cuts='each',slack=0.5}"),
    ],
)
def test_a_pass_prints_the_options_that_differ_from_their_defaults(step: Pass, text: str) -> None:
    assert str(step) == text


def test_the_public_boundary_adds_the_model_and_the_cuts() -> None:
    with pytest.raises(CutError) as caught:
        dnifx.decouple(mlp(4, 4, 2), ["nowhere"], args=(torch.randn(3, 4),))
    assert caught.value.__notes__ == ["while decoupling Sequential with cuts=['nowhere']"]


@pytest.mark.parametrize("model", [torch.relu, None, nn.Linear])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(CaptureError, match=r"decouple takes an nn.Module"):
        dnifx.decouple(model, ["0"], args=(torch.randn(3, 4),))
