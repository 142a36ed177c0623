"""The faults: what they change, what they leave alone, and that tests with and without teeth are told apart."""

from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, equivalents, line_of
from tests.mutants.faults import Fault, broken, faults
from tests.mutants.found import Found, digest
from tests.mutants.tests_of import Coverage, nearness
from tests.mutants.trial import Outcome, attempt, check_whole

SOURCE = '''"""A module."""

from typing import Any


def clamp(value: int | None, most: int = 3) -> Any:
    """Return the value, at most so much."""
    if value is None or value < 0:
        raise ValueError(f"{value + 1} is no value")
    if not most:
        return None
    return value if value <= most else most
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "clamp.py").write_text(SOURCE)
    return tmp_path


def test_a_fault_changes_one_thing_that_a_test_could_find(checkout: Path) -> None:
    found = {(each.before, each.after) for each in faults(checkout, "clamp.py")}
    assert found == {
        ("3", "4"),
        ("if value is None or value < 0:", "if not (value is None or value < 0):"),
        ("value is None or value < 0", "value is None and value < 0"),
        ("value is None", "value is not None"),
        ("value < 0", "value <= 0"),
        ("0", "1"),
        ("if not most:", "if not not most:"),
        ("not most", "most"),
        ("return value if value <= most else most", "return None"),
        ("value if value <= most else most", "value if not value <= most else most"),
        ("value <= most", "value < most"),
    }


def test_what_no_test_could_find_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(
        "def pairs(one: list[int], other: list[int]) -> object:\n    return zip(one, other, strict=True)\n"
    )
    assert [each.before for each in faults(tmp_path, "pairs.py")] == ["return zip(one, other, strict=True)"]


def test_every_fault_of_the_package_can_be_compiled_and_is_a_change() -> None:
    root = Path(__file__).parents[2]
    for path in ("passes/cuts/resolve.py", "dnifx/schedules/chance.py", "dnifx/runtime/net/states.py"):
        for fault in faults(root, path)[::7]:
            compile(broken(root, fault), path, "exec")
            assert fault.before != fault.after


@pytest.mark.parametrize(("expected", "result"), [("clamp(1) == 1", "survived"), ("clamp(5) == 3", "killed")])
def test_a_test_without_teeth_lets_a_fault_live(checkout: Path, expected: str, result: str) -> None:
    (checkout / "test_clamp.py").write_text(f"from clamp import clamp\n\n\ndef test_clamp():\n    assert {expected}\n")
    fault = next(each for each in faults(checkout, "clamp.py") if each.before == "3")
    assert attempt(checkout, fault, ["test_clamp.py::test_clamp"], 1.0).result == result
    assert (checkout / "clamp.py").read_text() == SOURCE


def test_a_test_that_is_gone_is_left_out(checkout: Path) -> None:
    (checkout / "test_clamp.py").write_text(
        "from clamp import clamp\n\n\ndef test_clamp():\n    assert clamp(5) == 3\n"
    )
    fault = next(each for each in faults(checkout, "clamp.py") if each.before == "3")
    assert attempt(checkout, fault, ["test_clamp.py::test_gone", "test_clamp.py::test_clamp"], 1.0).result == "killed"
    assert attempt(checkout, fault, ["test_clamp.py::test_gone"], 1.0).result == "unmet"


def test_tests_that_fail_without_a_fault_are_told(checkout: Path) -> None:
    (checkout / "test_clamp.py").write_text("def test_clamp():\n    assert False\n")
    with pytest.raises(RuntimeError, match="test_clamp fails without any fault"):
        check_whole(checkout, ["test_clamp.py::test_clamp"])


def test_a_line_that_no_test_runs_is_unmet(checkout: Path) -> None:
    fault = faults(checkout, "clamp.py")[0]
    assert attempt(checkout, fault, [], 1.0).result == "unmet"


def test_what_was_found_is_kept_until_the_file_changes(checkout: Path) -> None:
    one, two = faults(checkout, "clamp.py")[:2]
    Found(checkout, checkout / "kept" / "found").add(Outcome(one, "killed", "a test"))
    Found(checkout, checkout / "kept" / "found").add(Outcome(two, "survived", "7 tests"))
    again = Found(checkout, checkout / "kept" / "found")
    assert again.outcome(one) == Outcome(one, "killed", "a test")
    assert again.outcome(two) is None, "a test may have been written since"
    (checkout / "clamp.py").write_text(SOURCE + "\n")
    digest.cache_clear()
    assert again.outcome(one) is None


def test_tests_of_the_own_package_and_quick_ones_come_first() -> None:
    fault = Fault("passes/cuts/places.py", (8,), 0, "0", "1")
    met = {
        "tests/zoo/test_z.py::slow": 9.0,
        "tests/zoo/test_z.py::quick": 1.0,
        "tests/passes/cuts/test_p.py::long": 40.0,
    }
    coverage = Coverage(seconds=met)
    coverage.by_line["passes/cuts/places.py", 8] |= set(met)
    near, quick, slow = "tests/passes/cuts/test_p.py::long", "tests/zoo/test_z.py::quick", "tests/zoo/test_z.py::slow"
    assert coverage.tests(fault, 60.0) == [near, quick, slow]
    assert coverage.tests(fault, 45.0) == [near, quick]
    assert coverage.tests(fault, 1.0) == [near]
    assert nearness("tests/runtime/test_net.py::test", "dnifx/runtime/net/net.py") == 1


def test_every_fault_that_is_said_to_change_nothing_can_be_put_in() -> None:
    named = {
        line_of(fault) for path in {each.partition(":")[0] for each in equivalents()} for fault in faults(ROOT, path)
    }
    assert set(equivalents()) <= named, "a line has changed: look again whether the fault still changes nothing"
    assert all(equivalents().values()), "each has a reason"
