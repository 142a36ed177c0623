"""Schedules that depend on the step: by chance, by phase, now and then."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnifx import schedules
from dnifx.errors import ScheduleError, StateError
from dnifx.ir import Action, Kind, Program, Schedule
from dnifx.schedules import Answer, Lock, ScheduleSource
from dnifx.schedules.dependencies import links
from tests.schedules.schedule_programs import Gate, Plan, chain, programs

STEPS = st.integers(0, 2**40)
SEEDS = st.integers(0, 2**32)
CHANCES = st.floats(0, 1, exclude_min=True)


def fired(schedule: Schedule, kind: Kind = Kind.UPDATE) -> set[int]:
    return {action.index for action in schedule.actions if action.kind is kind}


def order(schedule: Schedule, kind: Kind) -> list[int]:
    return [action.index for action in schedule.actions if action.kind is kind]


@given(programs(), CHANCES, SEEDS, STEPS)
def test_random_order_is_valid_on_any_graph(program: Program, p: float, seed: int, step: int) -> None:
    schedule = schedules.random_order(p, seed).at(step, program)
    schedules.validate(schedule, program, partial=True)
    assert order(schedule, Kind.FORWARD) == list(range(len(program.partitions)))
    gates = links(program).gates
    answers = schedules.answers(schedule, program)
    assert all(answer is Answer.ESTIMATE for boundary, answer in answers.items() if not gates[boundary].locked)


@given(programs(), SEEDS, STEPS)
def test_random_order_with_certainty_runs_the_whole_step(program: Program, seed: int, step: int) -> None:
    schedule = schedules.random_order(1.0, seed).at(step, program)
    schedules.validate(schedule, program)
    assert set(schedule.actions) == set(schedules.sequential(program).actions)


@given(programs(imagines=True), CHANCES, SEEDS, STEPS)
def test_unlocked_is_valid_on_any_graph_and_a_busy_partition_does_nothing(
    program: Program, p: float, seed: int, step: int
) -> None:
    schedule = schedules.unlocked(p, seed).at(step, program)
    schedules.validate(schedule, program, partial=True)
    wiring, backward = links(program), fired(schedule, Kind.BACKWARD)
    trained = fired(schedules.sequential(program), Kind.BACKWARD)
    assert backward == fired(schedule, Kind.FORWARD) & trained
    assert fired(schedule) == {index for index in backward if wiring.owns[index]}


@given(programs(imagines=True), SEEDS, STEPS)
def test_unlocked_with_certainty_runs_the_whole_step(program: Program, seed: int, step: int) -> None:
    schedules.validate(schedules.unlocked(1.0, seed).at(step, program), program)


def test_unlocked_removes_every_lock_and_runs_forward_in_any_order() -> None:
    program, source = chain(4, imagines=True), schedules.unlocked(1.0)
    drawn = [source.at(step, program) for step in range(60)]
    assert all(locks == frozenset() for each in drawn for locks in schedules.locks(each, program))
    assert len({tuple(order(each, Kind.FORWARD)) for each in drawn}) > 12


def test_random_order_updates_in_any_order_and_removes_the_locks_behind() -> None:
    program, source = chain(4), schedules.random_order(1.0)
    drawn = [source.at(step, program) for step in range(60)]
    assert all(locks <= {Lock.FORWARD} for each in drawn for locks in schedules.locks(each, program))
    assert len({tuple(order(each, Kind.UPDATE)) for each in drawn}) > 12


@pytest.mark.parametrize(
    ("source", "imagines", "texts"),
    [
        (
            schedules.random_order(0.5, seed=3),
            False,
            [
                "F0 S0 F1 S1 F2 S2 F3 B1 T0 M0 U1 B2 T1 M1 U2 B3 T2 M2 U3",
                "F0 S0 F1 F2 S2 F3 B0 U0 B3 T2 M2 U3",
                "F0 S0 F1 F2 F3 B0 U0",
            ],
        ),
        (
            schedules.unlocked(0.5, seed=3),
            True,
            [
                "I1 F1 S1 B1 U1 I2 F2 S2 B2 T1 M1 U2 I3 F3 B3 T2 M2 U3",
                "F0 S0 B0 U0 I3 F3 B3 U3",
                "F0 S0 B0 U0",
            ],
        ),
    ],
)
def test_the_draws_of_saved_runs_stay_as_they_were(source: ScheduleSource, imagines: bool, texts: list[str]) -> None:
    program = chain(4, imagines=imagines)
    assert [str(source.at(step, program)) for step in (0, 7, 2**33)] == texts


def shares(source: ScheduleSource, program: Program, steps: int = 2000) -> list[float]:
    """How often each partition was updated."""
    drawn = [fired(source.at(step, program)) for step in range(steps)]
    return [sum(index in each for each in drawn) / steps for index in range(len(program.partitions))]


def test_partitions_fire_with_the_probability_that_was_asked_for() -> None:
    for share in shares(schedules.random_order(0.2), chain(4)):
        assert share == pytest.approx(0.2, abs=0.04)


def test_under_backpropagation_a_layer_fires_only_with_all_behind_it() -> None:
    found = shares(schedules.random_order(0.5), chain(4, locked=True))
    assert found == pytest.approx([0.5**4, 0.5**3, 0.5**2, 0.5], abs=0.05)
    assert all(front <= behind for front, behind in pairwise(found))


def test_partitions_that_share_a_parameter_fire_together() -> None:
    program = Plan((("tied",), ("p",), ("q",)), ((), (), ("tied",)), (Gate(0, (1,)), Gate(1, (2,)))).program
    drawn = [fired(schedules.random_order(0.5).at(step, program)) for step in range(200)]
    assert all((0 in each) == (2 in each) for each in drawn)
    assert any((0 in each) != (1 in each) for each in drawn)
    assert shares(schedules.random_order(0.5), program) == pytest.approx([0.5] * 3, abs=0.05)


def test_a_partition_is_busy_when_a_value_that_nothing_stands_in_for_is_not_there() -> None:
    program = Plan((("p",), ("q",)), gates=(Gate(0, (1,), imagines=True),), plain=((0, 1),)).program
    drawn = [fired(schedules.unlocked(0.5).at(step, program), Kind.FORWARD) for step in range(100)]
    assert {frozenset(each) for each in drawn} == {frozenset(), frozenset({0}), frozenset({0, 1})}


def test_targets_arrive_only_from_partitions_that_fired() -> None:
    program = chain(3)
    for step in range(100):
        schedule = schedules.random_order(0.5).at(step, program)
        assert fired(schedule, Kind.TARGET) == {index - 1 for index in fired(schedule, Kind.BACKWARD)} - {-1}
        assert fired(schedule, Kind.FIT) == fired(schedule, Kind.TARGET)


@pytest.mark.parametrize("make", [schedules.random_order, schedules.unlocked])
def test_a_step_is_drawn_from_the_seed_and_the_step_alone(make: Callable[[float, int], ScheduleSource]) -> None:
    program = chain(5, imagines=True)
    one, other = make(0.5, 7), make(0.5, 7)
    forward = [one.at(step, program) for step in range(20)]
    assert [other.at(step, program) for step in reversed(range(20))] == forward[::-1]
    assert [make(0.5, 8).at(step, program).actions for step in range(20)] != [each.actions for each in forward]
    assert len({each.actions for each in forward}) > 10


def test_unlocked_without_synthetic_inputs_is_refused() -> None:
    program = Plan((("p",), ("q",), ("r",)), gates=(Gate(0, (1,), imagines=True), Gate(1, (2,)))).program
    with pytest.raises(ScheduleError, match=r"there is none on \['layer1'\]"):
        schedules.unlocked(0.5).at(0, program)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ScheduleError, match="update probability"):
        schedules.random_order(p)
    with pytest.raises(ScheduleError, match="update probability"):
        schedules.unlocked(p)


def test_warm_up_fits_before_the_estimates_are_used() -> None:
    program, source = chain(3), schedules.warm_up(2)
    for step, answer in enumerate([Answer.TARGET, Answer.TARGET, Answer.ESTIMATE, Answer.ESTIMATE]):
        schedule = source.at(step, program)
        schedules.validate(schedule, program)
        assert set(schedules.answers(schedule, program).values()) == {answer}
        assert fired(schedule, Kind.FIT) == {0, 1}


def test_fits_are_left_out_but_every_few_steps() -> None:
    program, source = chain(3), schedules.fit_every(3)
    assert [len(fired(source.at(step, program), Kind.FIT)) for step in range(7)] == [2, 0, 0, 2, 0, 0, 2]
    assert [len(fired(source.at(step, program), Kind.TARGET)) for step in range(3)] == [2, 0, 0]


@pytest.mark.parametrize("bootstrap", [True, False])
def test_phases_alternate(bootstrap: bool) -> None:
    program, source = chain(2), schedules.alternate(true=1, synthetic=2, bootstrap=bootstrap)
    drawn = [source.at(step, program) for step in range(6)]
    for schedule in drawn:
        schedules.validate(schedule, program, partial=True)
    used = [schedules.answers(each, program)[0] for each in drawn]
    assert used == [Answer.TARGET, Answer.ESTIMATE, Answer.ESTIMATE] * 2
    assert [Action(Kind.FIT, 0) in each.actions for each in drawn] == [True, bootstrap, bootstrap] * 2


def test_a_true_phase_holds_the_locks_and_a_synthetic_one_does_not() -> None:
    program, source = chain(2), schedules.alternate(true=1, synthetic=1)
    first, second = (schedules.locks(source.at(step, program), program)[0] for step in range(2))
    assert first == {Lock.UPDATE, Lock.BACKWARD}
    assert second == frozenset()


@given(programs(), SEEDS, st.integers(0, 30))
def test_sources_compose_and_stay_valid(program: Program, seed: int, step: int) -> None:
    chance = schedules.random_order(0.5, seed)
    nested = schedules.warm_up(5, schedules.alternate(2, 3, schedules.fit_every(2, chance)))
    schedules.validate(nested.at(step, program), program, partial=True)


def sources() -> list[ScheduleSource]:
    return [
        schedules.resolve("sequential", chain(2)),
        schedules.resolve("backprop", chain(2)),
        schedules.fixed(schedules.sequential(chain(2))),
        schedules.random_order(0.5, 3),
        schedules.warm_up(2, schedules.unlocked(0.5, 4)),
        schedules.fit_every(2, schedules.random_order(0.5, 3)),
        schedules.alternate(2, 3, schedules.random_order(0.25, 3), bootstrap=False),
        schedules.fixed(schedules.parse_period("F0 S0 B0 U0 F1 | F0 F1")),
    ]


@pytest.mark.parametrize("place", range(len(sources())))
def test_a_source_that_was_saved_goes_on_as_it_would_have(place: int) -> None:
    program, source = chain(3, imagines=True), sources()[place]
    changed: dict[int, ScheduleSource] = {
        3: schedules.random_order(1.0),
        4: schedules.warm_up(9, schedules.unlocked(1.0)),
    }
    other = changed.get(place, sources()[place])
    other.load_state_dict(source.state_dict())
    assert [other.at(step, program) for step in range(5, 15)] == [source.at(step, program) for step in range(5, 15)]
    assert other.name == source.name


def test_a_state_holds_plain_values_only() -> None:
    def plain(value: object) -> bool:
        return all(map(plain, value.values())) if isinstance(value, dict) else isinstance(value, (int, float, str))

    assert all(plain(source.state_dict()) for source in sources())


def test_the_state_of_another_source_is_refused() -> None:
    with pytest.raises(StateError, match=r"'RandomOrder'.*made with Sequential"):
        schedules.resolve("sequential", chain(2)).load_state_dict(schedules.random_order(0.5).state_dict())
