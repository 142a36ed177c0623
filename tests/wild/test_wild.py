"""Random programs with Python control flow: the same ones each time; thousands of others by ``python -m tests.wild``."""

import ast
from dataclasses import replace

import pytest
import torch

from dnifx.errors import CaptureError, CutError, DnifxError, InputError, LegalizeError
from tests.wild.__main__ import Tally, is_wrong, reason
from tests.wild.checks import decoupled, detached, examine, fused, scheduled
from tests.wild.drawing import draw, wild
from tests.wild.programs import Wild
from tests.wild.shrink import shrink
from tests.wild.steps import FEATURES
from tests.wild.wide import MORE, draw_wide, wide

pytestmark = pytest.mark.filterwarnings("ignore:in this mode")
PASSING = (9, 9)
"""How many of each ten programs have to pass every check; the others are refused."""

WIDE_PASSING = 6
"""The same, of the first 12 of ``wide.py``."""

WRITES = """
class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
    def forward(self, x, y, mask=None, k=2):
        h = self.first(x)
        h[:, 1:] *= 2
        held = None
        for step in range(k):
            held = h if held is None else held + self.second(h) * step
        if mask is not None:
            held = held.masked_fill(mask, 0.1)
        return {'held': held, 'rows': h.shape[0] if x.shape[0] > 2 else None}
"""


def written(text: str = WRITES) -> Wild:
    return Wild("written", text.strip(), ["first"], "plain", masked=True, batch=3, training=True, features=frozenset())


@pytest.mark.parametrize("ten", range(len(PASSING)))
def test_random_programs_pass_or_are_refused(ten: int) -> None:
    tally = Tally()
    for number in range(10 * ten, 10 * ten + 10):
        tally.add(wild(number))
    assert not tally.wrong, "\n".join(f"{text}\n{program!r}" for program, text in tally.wrong)
    assert tally.passed >= PASSING[ten], dict(tally.refused)
    assert tally.boundaries >= tally.passed
    kinds = {text.partition(":")[0] for text in tally.refused}
    assert kinds <= {each.__name__ for each in (CaptureError, CutError, LegalizeError)}


def test_the_same_number_is_the_same_program() -> None:
    assert wild(7) == wild(7)
    assert wild(7).source != wild(7, seed=1).source
    assert wild(7).source in repr(wild(7))


def test_every_kind_of_step_is_drawn() -> None:
    drawn = [draw(f"0:{number}:0") for number in range(150)]
    reached = {feature for program in drawn for feature in program.features}
    assert {step.__name__ for step in FEATURES} | {"tied weights", "called twice", "returns nested"} <= reached
    assert {program.form for program in drawn} == {"plain", "keyword", "dict"}
    assert all(isinstance(ast.parse(program.source).body[0], ast.ClassDef) for program in drawn)


def test_a_program_written_by_hand_passes() -> None:
    boundaries, refusals = examine(written())
    assert boundaries == 1
    assert not refusals


def test_another_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    program, build = written(), Wild.build
    other = replace(program, source=program.source.replace("* step", "* step * 1.001"))
    turns = iter([program, other])
    monkeypatch.setattr(Wild, "build", lambda self: build(next(turns)))
    with pytest.raises(AssertionError, match="is not the same"):
        examine(program)


def test_gradients_that_cross_a_cut_are_noticed() -> None:
    args, kwargs = written().call()
    wanted = detached(decoupled(written(), "zero"), args, kwargs)
    for target in (fused, scheduled):
        found = target(decoupled(written(), "oracle"), args, kwargs)[1]
        one, two = found["first.bias"], wanted["first.bias"]
        assert one is not None
        assert two is None or not torch.allclose(one, two)


def test_cuts_that_are_named_are_mostly_such_as_the_loss_reaches() -> None:
    drawn = [draw(f"0:{number}:0") for number in range(60)]
    named = [(program, set(program.cuts)) for program in drawn if isinstance(program.cuts, list)]
    reached = [cuts <= program.reached() for program, cuts in named]
    assert sum(reached) >= 0.9 * len(reached) > 0
    text = WRITES.replace("        held = None", "        self.third(h)\n        held = None")
    text = text.replace(
        "        self.second.weight", "        self.third = nn.Linear(4, 4)\n        self.second.weight"
    )
    assert written(text).reached() - {""} == {"first", "second"}


def test_refusals_are_counted_by_reason() -> None:
    first = CutError("no cut 'm1': Drawn has that module\nmore")
    assert (
        reason(first)
        == "CutError: no cut '…': Drawn has that module"
        == reason(CutError("no cut 'm22': Drawn has that module"))
    )
    assert reason(InputError("for these inputs m7.bias is 3")) == "InputError: for these inputs … is …"


def test_an_error_that_is_not_our_own_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Wild, verify: bool) -> None:
        raise (KeyError if program.batch == 3 else DnifxError)("refused")

    monkeypatch.setattr("tests.wild.__main__.examine", fail)
    tally = Tally()
    tally.add(written())
    tally.add(replace(written(), batch=2))
    assert [text for _, text in tally.wrong] == ["KeyError: 'refused'"]
    assert dict(tally.refused) == {"DnifxError: refused": 1}


def test_parameters_keep_their_partitions_where_another_method_captures() -> None:
    program = replace(wild(4), cuts=["m9"])
    assert "if x.shape[0] > 2" in program.source
    boundaries, refusals = examine(program)
    assert boundaries == 1
    assert not refusals


def test_every_further_kind_of_step_and_of_cuts_is_drawn() -> None:
    drawn = [draw_wide(f"wide:0:{number}:0") for number in range(150)]
    reached = {feature for program in drawn for feature in program.features}
    kinds = {f"cut by {kind}" for kind in ("number", "each", "glob", "path", "call", "edge", "callable")}
    forms = {f"returns {form}" for form in ("tensor", "deep dict", "dataclass", "list")}
    assert {step.__name__ for step in {**FEATURES, **MORE}} | kinds | forms <= reached
    assert {program.optional for program in drawn if "keyword_only" in program.features} == {True, False}
    assert any("@" in str(program.cuts) for program in drawn if "cut by call" in program.features)
    assert wide(3) == wide(3)


def test_further_random_programs_pass_or_are_refused() -> None:
    tally = Tally()
    for number in range(12):
        tally.add(wide(number))
    assert not tally.wrong, "\n".join(f"{text}\n{program!r}" for program, text in tally.wrong)
    assert tally.passed >= WIDE_PASSING, dict(tally.refused)


def test_a_program_shrinks_to_what_fails() -> None:
    drawn = (each for each in map(wide, range(50)) if "class Answer" not in each.source)  # its dataclass stays whole
    program = next(each for each in drawn if len(each.source.splitlines()) > 30)
    kept = next(line.strip() for line in program.source.splitlines() if " = self.m" in line or "einsum" in line)

    def fails(other: Wild) -> bool:
        return kept.split(" = ")[1] in other.source

    small = shrink(program, fails)
    assert fails(small)
    assert small.runs()
    assert len(small.source.splitlines()) <= 16, small.source
    assert shrink(small, fails) == small


def test_a_wrong_program_is_told_from_a_refused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Wild, verify: bool) -> None:
        raise (AssertionError if program.batch == 3 else DnifxError)("so")

    monkeypatch.setattr("tests.wild.__main__.examine", fail)
    assert is_wrong(written())
    assert not is_wrong(replace(written(), batch=2))
