"""Schedules as a language: printed, parsed, ordered, refused, drawn."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from dnifx import schedules
from dnifx.errors import ScheduleError
from dnifx.ir import TRANSFERS, Action, Kind, Program, Schedule
from dnifx.passes.pipeline import run_passes
from dnifx.passes.schedule import ScheduleActions
from dnifx.schedules import Answer, Lock
from dnifx.schedules.dependencies import answers_by_order, links, needs
from tests.schedules.schedule_programs import Gate, Plan, chain, plans, programs, runs_on_machine

DEVICES = st.sampled_from([None, "cpu", "cuda:0", "cuda:13"])
STREAMS = st.none() | st.integers(0, 9)
INDICES = st.integers(0, 120)
ACTIONS = (
    st.builds(
        Action,
        st.sampled_from([kind for kind in Kind if kind not in TRANSFERS]),
        INDICES,
        DEVICES,
        STREAMS,
        st.none() | st.integers(0, 12),
    )
    | st.builds(Action, st.sampled_from([Kind.TARGET, Kind.FIT]), INDICES, DEVICES, STREAMS, lag=st.integers(0, 64))
    | st.builds(
        Action,
        st.sampled_from(sorted(TRANSFERS)),
        INDICES,
        DEVICES,
        STREAMS,
        st.integers(0, 5),
        st.just(0),
        st.integers(6, 12),
    )
)


def refused(schedule: Schedule, program: Program) -> str | None:
    """The text of the error, or None where the schedule is accepted."""
    try:
        schedules.validate(schedule, program)
    except ScheduleError as error:
        return str(error)
    return None


def without(schedule: Schedule, place: int) -> Schedule:
    return replace(schedule, actions=schedule.actions[:place] + schedule.actions[place + 1 :])


def swapped(schedule: Schedule, first: int, second: int) -> Schedule:
    actions = list(schedule.actions)
    actions[first], actions[second] = actions[second], actions[first]
    return replace(schedule, actions=tuple(actions))


@given(st.lists(ACTIONS).map(tuple), st.text(max_size=5))
def test_a_schedule_is_read_back_as_it_was_printed(actions: tuple[Action, ...], name: str) -> None:
    schedule = Schedule(name, actions)
    assert schedules.parse(str(schedule), name) == schedule


def test_a_schedule_may_have_lines_and_comments() -> None:
    text = "F0 S0  # the first partition\n\n  B0@cuda:0/2 U0/1\n# nothing"
    expected = (
        Action(Kind.FORWARD, 0),
        Action(Kind.SYNTHESISE, 0),
        Action(Kind.BACKWARD, 0, "cuda:0", 2),
        Action(Kind.UPDATE, 0, None, 1),
    )
    assert schedules.parse(text).actions == expected


@pytest.mark.parametrize(
    "word", ["X1", "F", "1F", "F1@", "F1@cpu/", "F1/x", "F-1", "f1", "F1@tpu9:0", "F1,", "SEND_F1", "F1>rank2"]
)
def test_a_word_that_is_no_action_is_named(word: str) -> None:
    with pytest.raises(ScheduleError, match="F1"):
        schedules.parse(f"F0 {word}")


def test_sequential_updates_each_partition_before_the_next_runs() -> None:
    assert str(schedules.sequential(chain(3))) == "F0 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2"


def test_sequential_with_oracles_is_backpropagation() -> None:
    program = chain(3, locked=True, fits=False)
    assert str(schedules.sequential(program)) == "F0 F1 F2 B2 T1 U2 B1 T0 U1 B0 U0"
    assert schedules.backprop(program).actions == schedules.sequential(program).actions


def test_backward_passes_that_could_run_at_once_go_from_the_last() -> None:
    gates = (Gate(0, (1, 2), True, False), Gate(1, (3,), True, False), Gate(2, (3,), True, False))
    program = Plan((("p",), ("q",), ("r",), ("s",)), gates=gates).program
    assert str(schedules.sequential(program)) == "F0 F1 F2 F3 B3 T1 T2 U3 B2 U2 B1 T0 U1 B0 U0"


def test_sequential_with_synthetic_inputs() -> None:
    assert str(schedules.sequential(chain(2, imagines=True))) == "F0 S0 B0 U0 I1 F1 B1 T0 M0 U1"


def test_sequential_computes_no_target_that_nothing_uses() -> None:
    program = chain(3, fits=False)
    assert str(schedules.sequential(program)) == "F0 S0 B0 U0 F1 S1 B1 U1 F2 B2 U2"
    assert str(schedules.sequential(program, diagnose=True)) == "F0 S0 B0 U0 F1 S1 B1 T0 U1 F2 B2 T1 U2"


def test_a_partition_without_parameters_runs_backward_only_for_a_target() -> None:
    fitted = Plan((("p",), (), ("q",)), gates=(Gate(0, (1,)), Gate(1, (2,)))).program
    assert str(schedules.sequential(fitted)) == "F0 S0 B0 U0 F1 S1 B1 T0 M0 F2 B2 T1 M1 U2"
    zero = Plan((("p",), (), ("q",)), gates=(Gate(0, (1,), fits=False), Gate(1, (2,)))).program
    assert str(schedules.sequential(zero)) == "F0 S0 B0 U0 F1 S1 F2 B2 T1 M1 U2"


def test_an_estimator_is_fitted_even_where_its_producer_has_no_use_for_it() -> None:
    program = Plan((("p",), (), ()), gates=(Gate(0, (1,), fits=False), Gate(1, (2,)))).program
    assert str(schedules.sequential(program)) == "F0 S0 B0 U0 F1 S1 F2 B2 T1 M1"


def test_a_shared_parameter_is_updated_after_all_its_users() -> None:
    plan = Plan((("tied",), ("p",), ("q",)), ((), (), ("tied",)), (Gate(0, (1,)), Gate(1, (2,))))
    schedule = schedules.sequential(plan.program)
    assert str(schedule) == "F0 S0 B0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U0 U2"
    early = schedules.parse("F0 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2")
    with pytest.raises(ScheduleError, match="partition 2 uses a parameter of partition 0"):
        schedules.validate(early, plan.program)


def test_the_same_program_gives_the_same_object() -> None:
    program = chain(3)
    assert schedules.sequential(program) is schedules.sequential(replace(program, notes=("seen",)))


@given(plans())
def test_sequential_is_valid_on_any_graph(plan: Plan) -> None:
    schedule = schedules.sequential(plan.program)
    schedules.validate(schedule, plan.program)
    schedules.validate(schedules.sequential(plan.program, diagnose=True), plan.program, diagnose=True)
    assert runs_on_machine(schedule.actions, plan)
    assert [each.index for each in schedule.actions if each.kind is Kind.FORWARD] == list(range(len(plan.parameters)))


@given(programs(locked=False))
def test_unlocked_partitions_update_before_the_next_runs_forward(program: Program) -> None:
    positions = {action: place for place, action in enumerate(schedules.sequential(program).actions)}
    for index, users in enumerate(links(program).users[:-1]):
        update = positions.get(Action(Kind.UPDATE, index))
        if update is not None and users == {index}:
            assert update < positions[Action(Kind.FORWARD, index + 1)]


@given(programs())
def test_any_removal_is_refused(program: Program) -> None:
    schedule = schedules.sequential(program)
    for place, action in enumerate(schedule.actions):
        assert refused(without(schedule, place), program), f"{action} was missed by nobody"


@given(programs())
def test_any_repetition_is_refused(program: Program) -> None:
    schedule = schedules.sequential(program)
    for action in schedule.actions:
        text = refused(replace(schedule, actions=(*schedule.actions, action)), program)
        assert text is not None
        assert "already stands" in text


@given(programs())
def test_any_swap_across_a_dependency_is_refused(program: Program) -> None:
    schedule, wiring = schedules.sequential(program), links(program)
    actions = schedule.actions
    answered = answers_by_order(actions, wiring)
    for place, action in enumerate(actions):
        for need in needs(action, frozenset(actions), wiring, answered):
            assert refused(swapped(schedule, actions.index(need), place), program), f"{action} ran before {need}"


@given(plans(), st.data())
def test_the_validator_and_a_machine_agree(plan: Plan, data: st.DataObject) -> None:
    schedule = schedules.sequential(plan.program)
    places = st.integers(0, len(schedule.actions) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        schedule = swapped(schedule, data.draw(places), data.draw(places))
    assert (refused(schedule, plan.program) is None) == runs_on_machine(schedule.actions, plan)


@pytest.mark.parametrize(
    ("text", "marked", "said"),
    [
        ("F0 B0 S0 U0 F1 B1 T0 M0 U1", "[B0]", "it needs S0 (estimate at boundary 0, 'layer0') before it"),
        ("F0 S0 B0 U0 F1 B1 T0 U1", "[M0]", "M0 (fit at boundary 0, 'layer0') is missing"),
        ("F0 S0 B0 F1 B1 T0 M0 U1", "[B0]", "its gradients are never applied. Add U0 (update of partition 0)"),
        ("F0 S0 B0 U0 F1 B1 T0 M0 U1 F7", "[F7]", "there is no partition 7: the program has 2, numbered from 0"),
        ("F0 S0 B0 U0 F1 B1 T0 M0 U1 S3", "[S3]", "there is no boundary 3: the program has 1, numbered from 0"),
        ("F0 S0 B0 U0 I1 F1 B1 T0 M0 U1", "[I1]", "no boundary that partition 1 consumes has a synthetic input model"),
    ],
)
def test_the_wrong_cell_is_marked_and_the_remedy_said(text: str, marked: str, said: str) -> None:
    found = refused(schedules.parse(text), chain(2))
    assert found is not None
    assert found.count("[") == 1
    assert marked in found
    assert said in found


@pytest.mark.parametrize(
    ("plan", "text", "said"),
    [
        (Plan((("p",), ("q",)), gates=(Gate(0, (1,), True, False),)), "F0 S0", "boundary 0 is locked"),
        (
            Plan((("p",), ("q",)), gates=(Gate(0, (1,), fits=False),)),
            "F0 S0 B0 U0 F1 B1 T0 M0",
            "nothing on boundary 0",
        ),
        (Plan((("p",), ()), gates=(Gate(0, (1,), fits=False),)), "F0 S0 B0 U0 F1 B1 U1", "owns no trainable"),
        (Plan(((), ("q",)), gates=()), "F0 B0", "reads no trainable parameter"),
        (Plan(((), ("q",)), gates=(Gate(0, (1,)),)), "F0 S0", "no trainable parameter stands before boundary 0"),
    ],
)
def test_what_has_nothing_to_do_is_refused(plan: Plan, text: str, said: str) -> None:
    assert said in (refused(schedules.parse(text), plan.program) or "")


def test_a_partial_step_has_to_be_called_one() -> None:
    schedule, program = schedules.parse("F0 F1 B1 U1"), chain(2)
    assert refused(schedule, program)
    schedules.validate(schedule, program, partial=True)
    assert schedules.resolve(schedules.fixed(schedule, partial=True), program).at(7, program) is schedule


def test_a_partial_step_that_updates_half_of_what_it_ran_is_refused() -> None:
    with pytest.raises(ScheduleError, match="never applied"):
        schedules.validate(schedules.parse("F0 F1 B1"), chain(2), partial=True)


def test_a_program_without_interfaces_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"'layer0'.*insert"):
        schedules.sequential(replace(chain(2), interfaces=()))


def test_the_gradient_comes_from_what_stands_before_the_backward_pass() -> None:
    program = chain(2)
    assert schedules.answers(schedules.sequential(program), program) == {0: Answer.ESTIMATE}
    assert schedules.answers(schedules.backprop(program), program) == {0: Answer.TARGET}
    late = schedules.parse("F0 S0 F1 B1 T0 B0 U0 U1 M0")
    schedules.validate(late, program)
    assert schedules.answers(late, program) == {0: Answer.ESTIMATE}
    mixed = chain(2, locked=True)
    assert schedules.answers(schedules.sequential(mixed), mixed) == {0: Answer.BOTH}


@given(plans())
def test_backprop_waits_for_every_target_on_any_graph(plan: Plan) -> None:
    program = plan.program
    for fit in (True, False):
        schedule = schedules.backprop(program, fit)
        schedules.validate(schedule, program, partial=True)
        assert set(schedules.answers(schedule, program).values()) <= {Answer.TARGET}
        assert any(each.kind is Kind.FIT for each in schedule.actions) <= fit


@given(programs(), st.booleans())
def test_leaving_the_fits_out_keeps_what_the_updates_need(program: Program, true: bool) -> None:
    whole = schedules.backprop(program) if true else schedules.sequential(program)
    bare = schedules.without_fits(whole, program)
    schedules.validate(bare, program, partial=True)
    assert schedules.answers(bare, program).items() <= schedules.answers(whole, program).items()
    kinds = (Kind.FORWARD, Kind.UPDATE)
    assert [each for each in bare.actions if each.kind in kinds] == [
        each for each in whole.actions if each.kind in kinds
    ]
    assert not any(each.kind is Kind.FIT for each in bare.actions)


def test_leaving_the_fits_out_leaves_targets_and_idle_estimates_out() -> None:
    program = chain(2)
    assert str(schedules.without_fits(schedules.sequential(program), program)) == "F0 S0 B0 U0 F1 B1 U1"
    assert str(schedules.without_fits(schedules.backprop(program), program)) == "F0 F1 B1 T0 U1 B0 U0"


@given(programs(), st.integers(0, 2**20))
def test_every_target_that_can_arrive_does_when_diagnosed(program: Program, seed: int) -> None:
    whole = schedules.sequential(program, diagnose=True)
    bare = replace(whole, actions=tuple(each for each in whole.actions if each.kind not in (Kind.TARGET, Kind.FIT)))
    assert {*schedules.diagnosed(bare, program).actions} == {
        each for each in whole.actions if each.kind is not Kind.FIT
    }
    drawn = schedules.random_order(0.6, seed).at(0, program)
    found = schedules.diagnosed(drawn, program)
    schedules.validate(found, program, partial=True)
    backward = {each.index for each in drawn.actions if each.kind is Kind.BACKWARD}
    arrived = {each.index for each in found.actions if each.kind is Kind.TARGET}
    assert arrived == {index for index, gate in enumerate(links(program).gates) if gate.consumers <= backward}
    assert schedules.answers(found, program) == schedules.answers(drawn, program)


def test_locks_of_the_paper() -> None:
    every, none = frozenset(Lock), frozenset[Lock]()
    behind = frozenset({Lock.UPDATE, Lock.BACKWARD})
    plain, synthetic, imagined = chain(3, locked=True), chain(3), chain(3, imagines=True)
    front = frozenset({Lock.FORWARD})
    assert schedules.locks(schedules.sequential(plain), plain) == (behind, every, front)
    assert schedules.locks(schedules.sequential(synthetic), synthetic) == (none, front, front)
    assert schedules.locks(schedules.sequential(imagined), imagined) == (none, none, none)
    assert schedules.locks(schedules.backprop(synthetic), synthetic) == (behind, every, front)


def test_a_shared_parameter_keeps_its_owner_locked() -> None:
    program = Plan((("tied",), ("q",)), ((), ("tied",)), (Gate(0, (1,)),)).program
    assert schedules.locks(schedules.sequential(program), program)[0] == {Lock.UPDATE, Lock.BACKWARD}
    far = Plan((("tied",), (), ("q",)), ((), (), ("tied",)), (Gate(0, (1,)), Gate(1, (2,)))).program
    assert schedules.locks(schedules.sequential(far), far)[0] == {Lock.UPDATE, Lock.BACKWARD}


@given(programs(locked=False, imagines=True))
def test_synthetic_gradients_and_inputs_remove_all_locks_but_those_of_plain_values_and_shared_parameters(
    program: Program,
) -> None:
    wiring = links(program)
    for index, left in enumerate(schedules.locks(schedules.sequential(program), program)):
        assert (Lock.FORWARD in left) == bool(wiring.direct[index])
        if wiring.users[index] <= {index}:
            assert left <= {Lock.FORWARD}


@given(programs(), st.integers(30, 140))
def test_the_grid_holds_every_action_once_in_lines_that_fit(program: Program, width: int) -> None:
    schedule = schedules.sequential(program)
    picture = schedules.grid(schedule, program)
    lines = picture.plain(width).splitlines()
    assert max(map(len, lines[1:])) <= width
    assert str(picture) == picture.plain(100)
    words = [word for line in lines[1:] if not line.startswith("time") for word in line.split()[1:]]
    assert sorted(words) == sorted(map(str, schedule.actions))
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(picture)
    assert [line.rstrip() for line in capture.get().splitlines()][1:] == lines[1:]


def test_the_grid_of_one_device_has_one_action_a_column() -> None:
    expected = """\
sequential: 9 actions
time       0   1   2   3   4   5   6   7   8
submod_0  F0  S0  B0  U0          T0  M0
submod_1                  F1  B1          U1"""
    program = chain(2)
    assert str(schedules.grid(schedules.sequential(program), program)) == expected


def test_the_grid_of_two_devices_shows_what_runs_at_the_same_time() -> None:
    expected = """\
sequential: 9 actions
time                0   1   2   3   4
submod_0@cuda:0/0  F0  S0  B0  U0
submod_0@cuda:0/1              T0  M0
submod_1@cuda:1/0      F1  B1  U1"""
    program = chain(2)
    schedule = schedules.placed(schedules.sequential(program), program, ["cuda:0", "cuda:1"])
    assert str(schedules.grid(schedule, program)) == expected
    with pytest.raises(ScheduleError, match="1 devices were given for 2 partitions"):
        schedules.placed(schedule, program, ["cpu"])


def test_a_schedule_is_asked_for_by_name_text_or_value() -> None:
    program = chain(2)
    whole = schedules.sequential(program)
    assert schedules.resolve("sequential", program).at(3, program) is whole
    assert schedules.resolve(str(whole), program).at(3, program).actions == whole.actions
    assert schedules.resolve(whole, program).at(3, program) is whole
    drawn = schedules.resolve("random_order{p=0.5, seed=3}", program)
    assert drawn.at(4, program) == schedules.random_order(0.5, 3).at(4, program)
    phased = schedules.resolve("warm_up{steps=1,then=sequential}", program)
    assert phased.at(1, program) is whole


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sequntial", "nearest: 'sequential'"),
        ("random_order", "p"),
        ("random_order{q=1}", "q"),
        ("random_order{p=x}", "'x'"),
        ("random_order{p=0}", "p=0 is not an update probability"),
        ("fit_every{every=0}", "every=0"),
        ("unlocked{p=0.5}", "synthetic input model"),
        ("F0 S0", "B0"),
        (3, "int is not a schedule"),
    ],
)
def test_what_is_no_schedule_is_refused_with_a_remedy(spec: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        schedules.resolve(spec, chain(2))


def with_rates(program: Program, *every: int) -> Program:
    rated = zip(program.partitions, every, strict=True)
    return replace(program, partitions=tuple(replace(partition, every=windows) for partition, windows in rated))


def test_a_schedule_is_asked_for_in_the_same_way_with_rates() -> None:
    rated, plain = with_rates(chain(2), 1, 2), chain(2)
    period = schedules.period_of("sequential", rated)
    assert period == schedules.sequential_period(rated)
    assert str(period) == "F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 T0 M0 U1"
    for spec in ("sequential", str(period), period, schedules.fixed(period)):
        source = schedules.resolve(spec, rated)
        assert [source.at(window, rated).actions for window in range(4)] == [w.actions for w in period.windows] * 2
    assert schedules.period_of("sequential", plain) is schedules.sequential(plain)
    assert schedules.sequential_period(plain).windows == (schedules.sequential(plain),)


def test_the_windows_of_a_period_take_turns_without_rates_too() -> None:
    program, fitted, bare = chain(2), "F0 S0 B0 U0 F1 B1 T0 M0 U1", "F0 S0 B0 U0 F1 B1 U1"
    source = schedules.resolve(f"{fitted}  # then | without\n | {bare}", program)
    assert [str(source.at(step, program)) for step in range(3)] == [fitted, bare, fitted]
    with pytest.raises(ScheduleError, match=r"Window 1 .* F1 is missing"):
        schedules.resolve(f"{fitted} | F0 S0 B0 U0", program)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("backprop", "'backprop' is for a single step, but the partitions fire at different rates"),
        (schedules.random_order(0.5), "submod_0 every 1, submod_1 every 2"),
        ("F0 S0 B0 U0 F1 B1 T0 M0 U1", "a period with | between its windows: F0 S0 B0 U0 | F0 S0"),
        ("F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 U1 F7", "there is no partition 7"),
    ],
)
def test_rates_need_a_period(spec: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(said)):
        schedules.resolve(spec, with_rates(chain(2), 1, 2))


def test_the_pass_sets_the_schedule() -> None:
    program = chain(3)
    assert run_passes(program, [ScheduleActions()]).schedule is schedules.sequential(program)
    drawn = run_passes(program, [ScheduleActions("random_order{p=0.5}")]).schedule
    assert drawn == schedules.random_order(0.5).at(0, program)
    with pytest.raises(ScheduleError, match="is missing"):
        run_passes(program, [ScheduleActions("F0")])


def test_a_program_of_one_partition_has_a_schedule() -> None:
    program = Program(nn.Identity(), partitions=chain(1).partitions)
    assert str(schedules.sequential(program)) == "F0 B0 U0"
