"""Lags in schedules: targets that are used late."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnifx import schedules
from dnifx.errors import ScheduleError
from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules.language import unplaced
from dnifx.schedules.validation import BESIDE
from tests.schedules.schedule_programs import Gate, Plan, chain, programs


def lags(schedule: Schedule) -> dict[str, int]:
    return {f"{action.kind}{action.index}": action.lag for action in schedule.actions}


def test_targets_and_fits_get_the_lag() -> None:
    program = chain(3)
    found = schedules.lagged(schedules.sequential(program), program, 4)
    assert str(found) == "F0 S0 B0 U0 F1 S1 B1 T0-4 M0-4 U1 F2 B2 T1-4 M1-4 U2"
    schedules.validate(found, program)
    assert schedules.parse(str(found), found.name) == found


@given(programs(locked=False, imagines=False), st.integers(1, 9), st.integers(0, 40))
def test_a_lag_is_valid_on_any_graph(program: Program, lag: int, step: int) -> None:
    wrong = [
        each for each in program.interfaces if each.fits and each.needs_end and (each.needs_loss or each.needs_target)
    ]
    source = schedules.Lagged(lag, schedules.random_order(0.6, step))
    if wrong:
        with pytest.raises(ScheduleError, match="cannot be used"):
            source.at(step, program)
        return
    found, plain = source.at(step, program), source.then.at(step, program)
    schedules.validate(found, program, partial=True)
    late, now = ((unplaced(each) for each in made.actions if each.kind not in BESIDE) for made in (found, plain))
    assert [each for each in late if each.kind is not Kind.FIT] == [each for each in now if each.kind is not Kind.FIT]
    assert all(each.lag in (0, lag) for each in found.actions)


@given(st.integers(1, 6), st.integers(1, 5))
def test_a_target_is_used_once_and_so_many_steps_later(lag: int, every: int) -> None:
    program, source = chain(2), schedules.Lagged(lag, schedules.fit_every(every))
    steps = [source.at(step, program) for step in range(30)]
    kept = {step for step, each in enumerate(steps) if Action(Kind.TARGET, 0, lag=lag) in each.actions}
    used = {step for step, each in enumerate(steps) if Action(Kind.FIT, 0, lag=lag) in each.actions}
    assert kept == set(range(0, 30, every))
    assert {step for step in used if step >= lag} == {step + lag for step in kept if step + lag < 30}


def test_a_phase_that_waits_for_the_target_keeps_its_fit() -> None:
    program, source = chain(2), schedules.Lagged(2, schedules.alternate(2, 2))
    texts = [lags(source.at(step, program)) for step in range(8)]
    assert [text.get("T0") for text in texts] == [0, 0, 2, 2, 0, 0, 2, 2]
    assert [text.get("M0") for text in texts] == [0, 0, None, None, 0, 0, None, None]


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (Gate(0, (1,), locked=True), "waits for the target"),
        (Gate(0, (1,), imagines=True), "synthetic input model"),
        (Gate(0, (1,), learns="loss"), "the loss"),
        (Gate(0, (1,), learns="both"), "the loss"),
        (Gate(0, (1,), errs=True), "output's error"),
    ],
)
def test_what_cannot_be_fitted_late_is_refused(gate: Gate, said: str) -> None:
    program = Plan((("a",), ("b",)), gates=(gate,)).program
    with pytest.raises(ScheduleError, match=said) as caught:
        schedules.resolve("lagged{lag=2}", program)
    assert "boundary 0" in str(caught.value)
    plain = schedules.sequential(program)
    late = [replace(each, lag=2 if each.kind in (Kind.TARGET, Kind.FIT) else 0) for each in plain.actions]
    with pytest.raises(ScheduleError, match=said):
        schedules.validate(replace(plain, actions=tuple(late)), program, partial=True)


def test_an_estimator_without_a_target_has_nothing_that_comes_late() -> None:
    program = Plan((("a",), ("b",)), gates=(Gate(0, (1,), learns="alone"),)).program
    plain = schedules.sequential(program)
    assert schedules.lagged(plain, program, 3) == plain
    with pytest.raises(ScheduleError, match="learns without a target"):
        schedules.validate(schedules.parse(str(plain).replace("M0", "M0-3")), program)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F0 S0 B0 U0 F1 B1 T0-4 M0-3 U1", "Give both the same"),
        ("F0 S0 B0 U0 F1 B1 T0-4 M0 U1", "Give both the same"),
        ("F0 S0 B0 U0 F1 T0-4 B1 M0-4 U1", "B1"),
        ("F0 S0 F1 B1 T0-1 M0-1 U1 B0 U0 T0", "already stands"),
        ("F0 F1 B1 T0-4 B0 S0 U0 M0-4 U1", "needs S0"),
    ],
)
def test_a_wrong_lag_is_refused(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        schedules.validate(schedules.parse(text), chain(2))


@pytest.mark.parametrize("word", ["I0-1", "S0-2", "SEND_T0-1@rank0>rank1"])
def test_not_every_action_can_be_late(word: str) -> None:
    with pytest.raises(ScheduleError, match="has a lag"):
        schedules.parse(word)


def test_rates_and_lags_do_not_go_together() -> None:
    program = chain(2)
    slow = replace(program, partitions=(program.partitions[0], replace(program.partitions[1], every=2)))
    with pytest.raises(ScheduleError, match="every="):
        schedules.lagged(schedules.sequential(slow), slow, 1)


def test_a_lag_hides_the_latency_of_a_link() -> None:
    program, costs = (
        chain(2),
        {"F0": 1.0, "B0": 1.0, "F1": 1.0, "B1": 1.0, "S0": 0.0, "T0": 0.0, "M0": 0.0, "U0": 0.0, "U1": 0.0},
    )
    times = {}
    for lag in (0, 2, 8):
        late = schedules.lagged(schedules.sequential(program), program, lag)
        over = schedules.transferred(late, program, (0, 1))
        times[lag] = schedules.simulate(over, program, costs, 40, schedules.Link(latency=5.0)).makespan / 40
    assert times[0] > 10
    assert times[8] < times[2] < times[0]
    assert times[8] == pytest.approx(2.0, abs=0.5)
