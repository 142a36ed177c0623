"""Schedules in time."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from dnifx import schedules
from dnifx.errors import ScheduleError
from dnifx.ir import TRANSFERS, Action, Kind, Program, Schedule
from dnifx.report.trace import chrome_trace, write_chrome_trace
from dnifx.schedules import Lock, Simulation
from dnifx.schedules.clock import Span, moved_bytes, value_bytes
from dnifx.schedules.costs import measured_costs
from dnifx.schedules.dependencies import Links, answers_by_order, links, needs
from dnifx.schedules.language import unplaced
from tests.schedules.schedule_programs import Gate, Plan, chain, programs

UNIT = {"F": 1.0, "B": 2.0}
"""Seconds by kind, where a forward takes one and all that stands on the boundaries takes none."""


def spread(schedule: Schedule, program: Program) -> Schedule:
    """The schedule with a device for each partition."""
    return schedules.placed(schedule, program, [f"cuda:{index}" for index in range(len(program.partitions))])


def unit_costs(schedule: Schedule) -> dict[str, float]:
    return {str(unplaced(action)): UNIT.get(action.kind, 0.0) for action in schedule.actions}


def run(schedule: Schedule, program: Program, steps: int = 1) -> Simulation:
    return schedules.simulate(schedule, program, unit_costs(schedule), steps)


@given(programs(), st.booleans(), st.integers(1, 3), st.integers(0, 2**20))
def test_time_is_bounded_by_the_work_and_by_its_longest_chain(
    program: Program, apart: bool, steps: int, seed: int
) -> None:
    schedule = schedules.random_order(0.7, seed).at(0, program)
    placed = spread(schedule, program) if apart else schedule
    found, costs = schedules.simulate(placed, program, steps=steps), measured_costs(program)
    work = sum(costs[action] for action in schedule.actions)
    assert found.makespan <= steps * work * (1 + 1e-12)
    assert found.makespan >= longest_chain(schedule, program, costs) * (1 - 1e-12)
    busy = sum((1 - idle) * found.makespan for idle in found.bubble.values())
    assert busy <= steps * work * (1 + 1e-9)
    if not apart:
        assert found.makespan == pytest.approx(steps * work)
        assert found.bubble["cpu"] == pytest.approx(0)
        assert found.binds is None


def longest_chain(schedule: Schedule, program: Program, costs: dict[Action, float]) -> float:
    wiring = links(program)
    answered = answers_by_order(schedule.actions, wiring)
    ends: dict[Action, float] = {}
    for action in schedule.actions:
        earlier = needs(action, frozenset(schedule.actions), wiring, answered)
        ends[action] = costs[action] + max((ends[need] for need in earlier), default=0.0)
    return max(ends.values())


@given(programs(), st.booleans(), st.integers(1, 3))
def test_actions_wait_for_what_they_need_and_for_their_stream(program: Program, true: bool, steps: int) -> None:
    schedule = spread(schedules.backprop(program) if true else schedules.sequential(program), program)
    bare, wiring = tuple(map(unplaced, schedule.actions)), links(program)
    answered = answers_by_order(bare, wiring)
    found = schedules.simulate(schedule, program, steps=steps)
    ends = {(span.step, unplaced(span.action)): span.end for span in found.spans}
    free: dict[tuple[str, int], float] = {}
    for span in found.spans:
        action = unplaced(span.action)
        assert all(ends[span.step, need] <= span.start for need in needs(action, frozenset(bare), wiring, answered))
        if action.kind is Kind.FORWARD and span.step:
            updates = [(span.step - 1, Action(Kind.UPDATE, owner)) for owner in wiring.owners[action.index]]
            assert all(ends[update] <= span.start for update in updates if update in ends)
        assert free.get((span.device, span.stream), 0.0) <= span.start
        free[span.device, span.stream] = span.end
    path = [found.spans[place] for place in found.critical]
    assert path[0].start == 0
    assert path[-1].end == found.makespan
    assert all(before.end == after.start for before, after in pairwise(path))


def needed_of_last_step(action: Action, wiring: Links) -> list[Action]:
    """Return what an action needs of the step before: its parameters updated, its estimator or input model fitted."""
    match action.kind:
        case Kind.FORWARD:
            return [Action(Kind.UPDATE, owner) for owner in wiring.owners[action.index]]
        case Kind.SYNTHESISE:
            return [Action(Kind.FIT, action.index)]
        case Kind.INPUT:
            return [Action(Kind.FIT, boundary) for boundary in wiring.consumed[action.index]]
        case _:
            return []


@given(programs(), st.booleans(), st.integers(1, 3), st.integers(0, 2**20))
def test_an_action_begins_as_soon_as_it_can(program: Program, apart: bool, steps: int, seed: int) -> None:
    schedule = schedules.random_order(0.7, seed).at(0, program)
    schedule = spread(schedule, program) if apart else schedule
    bare, wiring = tuple(map(unplaced, schedule.actions)), links(program)
    answered = answers_by_order(bare, wiring)
    costs = {str(action): float(1 + (3 * index + seed) % 5) for index, action in enumerate(bare)}
    found = schedules.simulate(schedule, program, costs, steps=steps)
    ends: dict[tuple[int, Action], float] = {}
    free: dict[tuple[str, int], float] = {}
    for span in found.spans:
        action = unplaced(span.action)
        earlier = [(span.step, need) for need in needs(action, frozenset(bare), wiring, answered)]
        earlier += [(span.step - 1, need) for need in needed_of_last_step(action, wiring)]
        assert span.ready == max((ends[each] for each in earlier if each in ends), default=0.0)
        assert span.free == free.get((span.device, span.stream), 0.0)
        assert span.end == max(span.ready, span.free) + costs[str(action)]
        assert span.partition == wiring.place(action)
        ends[span.step, action] = free[span.device, span.stream] = span.end
        causes = [place for place, other in enumerate(found.spans) if other.end == span.start and other is not span]
        assert span.cause in causes if span.start else span.cause is None
    assert (found.steps, found.unit) == (steps, "s")
    assert found.makespan == max(ends.values())
    times = range(int(found.makespan))
    for device in found.bubble:
        here = [span for span in found.spans if span.device == device]
        busy = sum(any(span.start <= time < span.end for span in here) for time in times)
        assert found.bubble[device] == pytest.approx(1 - busy / found.makespan)
        held = [sum(bytes_held(program, span, found, time) for span in here) for time in times]
        assert found.peak_bytes[device] == max(held)


def bytes_held(program: Program, span: Span, found: Simulation, time: int) -> int:
    """Return what a forward holds at a time: the activations of its partition, until the partition's backward has ended."""
    if span.action.kind is not Kind.FORWARD:
        return 0
    back = [each.end for each in found.spans if each.step == span.step and unplaced(each.action) == backward(span)]
    return program.partitions[span.partition].activation_bytes * (span.start <= time < max([span.end, *back]))


def backward(span: Span) -> Action:
    return Action(Kind.BACKWARD, span.partition)


def test_a_message_travels_once_the_link_is_free() -> None:
    program = chain(2)
    late = schedules.lagged(schedules.sequential(program), program, 2)
    sent = schedules.transferred(late, program, (0, 1))
    costs = {str(unplaced(action)): 1.0 for action in sent.actions if action.kind not in TRANSFERS}
    assert program.boundaries[0].specs[0].bytes == 128
    sizes = value_bytes(program)
    assert [moved_bytes(Action(kind, 0), program, sizes) for kind in (Kind.SEND_TARGET, Kind.SEND_VALUES)] == [128, 128]
    link = schedules.Link(latency=2.0, bandwidth=128 / 16)
    spans = schedules.simulate(sent, program, costs, steps=4, link=link).spans
    times = {(span.step, str(span.action).partition("@")[0]): span for span in spans}
    assert [times[step, "SEND_F0"].end for step in (0, 1)] == [1, 7]
    assert [times[step, "RECV_F0"].end for step in (0, 1)] == [1 + 16 + 2, 1 + 16 + 16 + 2]
    assert times[0, "F1"].ready == times[0, "RECV_F0"].end
    assert times[0, "SEND_T0"].end == 21
    assert [times[step, "RECV_T0-2"].ready for step in (0, 1, 2)] == [0, 0, 21 + 16 + 2]
    assert [times[step, "M0-2"].start for step in (0, 1, 2)] == [5, 11, 39]


def test_backpropagation_over_devices_takes_turns() -> None:
    program = chain(4, locked=True, fits=False)
    found = run(spread(schedules.sequential(program), program), program, steps=3)
    assert found.makespan == 3 * 12
    assert found.bubble == pytest.approx(dict.fromkeys(found.bubble, 0.75))
    assert found.binds is Lock.BACKWARD
    assert found.waits[Lock.UPDATE] == 3 * (3 + 2 + 1)


def test_synthetic_gradients_leave_the_forward_lock_alone() -> None:
    program = chain(4)
    found = run(spread(schedules.sequential(program), program), program, steps=3)
    assert found.makespan == 3 + 3 * 3
    assert found.binds is Lock.FORWARD
    assert found.waits == {Lock.FORWARD: 1 + 2 + 3, Lock.UPDATE: 0, Lock.BACKWARD: 0}


def test_synthetic_inputs_leave_no_lock() -> None:
    program = chain(4, imagines=True)
    found = run(spread(schedules.sequential(program), program), program)
    assert found.makespan == 3
    assert found.binds is None
    assert found.bubble == dict.fromkeys(found.bubble, 0.0)


def test_an_estimate_waits_for_the_fit_of_the_step_before() -> None:
    program = chain(2)
    schedule = spread(schedules.sequential(program), program)
    found = schedules.simulate(schedule, program, unit_costs(schedule) | {"M0": 10.0}, steps=2)
    times = {(span.step, str(unplaced(span.action))): span for span in found.spans}
    assert times[0, "M0"].end == times[1, "S0"].start == 14
    assert times[1, "F0"].start == 3


def test_a_shared_parameter_is_not_read_before_its_update() -> None:
    program = Plan(((), ("tied",)), (("tied",), ()), (Gate(0, (1,)),)).program
    schedule = spread(schedules.sequential(program), program)
    found = schedules.simulate(schedule, program, unit_costs(schedule) | {"U1": 10.0}, steps=2)
    times = {(span.step, str(unplaced(span.action))): span for span in found.spans}
    assert times[0, "U1"].end == times[1, "F0"].start == 14


def test_activations_are_held_from_forward_to_backward() -> None:
    unlocked, locked = chain(4), chain(4, locked=True, fits=False)
    sizes = [partition.activation_bytes for partition in locked.partitions]
    assert schedules.simulate(schedules.sequential(unlocked), unlocked).peak_bytes == {"cpu": max(sizes)}
    assert schedules.simulate(schedules.sequential(locked), locked).peak_bytes == {"cpu": sum(sizes)}
    idle = schedules.parse("F0 F1 F2 F3")
    assert schedules.simulate(idle, unlocked).peak_bytes == {"cpu": max(sizes)}
    apart = schedules.simulate(spread(schedules.sequential(locked), locked), locked)
    assert list(apart.peak_bytes.values()) == sizes


def test_costs_come_from_what_was_measured() -> None:
    program = chain(2, imagines=True)
    costs = {str(action): cost for action, cost in measured_costs(program).items()}
    assert costs["F0"] == 1000 + 128 / 4
    assert costs["B0"] == 2 * costs["F0"]
    assert costs["U0"] == 10 * 400 / 4
    assert costs["S0"] == costs["I1"] == 2 * 8 * 20
    assert costs["M0"] == 2 * (2 * costs["S0"] + 10 * 20)
    assert costs["T0"] == 0


def test_an_image_estimator_costs_its_parameters_at_every_pixel() -> None:
    program = chain(2)
    images = replace(program.boundaries[0].specs[0], shape=(8, 3, 5, 5))
    boundary = replace(program.boundaries[0], specs=(images,))
    convolution = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    interface = replace(program.interfaces[0], estimator=convolution)
    costs = measured_costs(replace(program, boundaries=(boundary,), interfaces=(interface,)))
    assert costs[Action(Kind.SYNTHESISE, 0)] == 2 * 8 * 25 * convolution.weight.numel()
    zero = replace(program.interfaces[0], estimator=nn.Identity())
    costs = measured_costs(replace(program, boundaries=(boundary,), interfaces=(zero,)))
    assert costs[Action(Kind.SYNTHESISE, 0)] == 8 * 3 * 25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"F0": None}, "No cost was given for F0"),
        ({"F00": 1.0}, "'F00'.*nearest: 'F0'"),
        ({"B1": -1.0}, "B1 is -1.0"),
        ({"B1": float("nan")}, "B1 is nan"),
    ],
)
def test_costs_that_do_not_fit_are_refused(change: dict[str, float | None], said: str) -> None:
    program = chain(2)
    schedule = schedules.sequential(program)
    given_costs = {name: cost for name, cost in (unit_costs(schedule) | change).items() if cost is not None}
    with pytest.raises(ScheduleError, match=said):
        schedules.simulate(schedule, program, given_costs)


def test_what_is_not_valid_is_not_simulated() -> None:
    with pytest.raises(ScheduleError, match="B0"):
        schedules.simulate(schedules.parse("F0 B0"), chain(2))
    with pytest.raises(ScheduleError, match="steps=0"):
        schedules.simulate(schedules.sequential(chain(2)), chain(2), steps=0)


def test_an_empty_step_takes_no_time() -> None:
    found = schedules.simulate(Schedule("nothing", ()), chain(2))
    assert (found.makespan, found.spans, found.binds) == (0.0, (), None)


def test_a_simulation_is_shown() -> None:
    program = chain(2, locked=True)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(run(spread(schedules.sequential(program), program), program, steps=2))
    shown = capture.get()
    assert "sequential: 2 steps in 12 s" in shown
    assert "cuda:1" in shown
    assert "50.0%" in shown
    assert "waiting on the critical path, by lock: forward 20%, update 20%, backward 60%" in shown


def test_a_chrome_trace_has_every_action_where_and_when_it_ran(tmp_path: Path) -> None:
    program = chain(2)
    found = run(spread(schedules.sequential(program), program), program, steps=2)
    trace = json.loads(write_chrome_trace(found, tmp_path / "trace.json").read_text())
    assert trace == chrome_trace(found)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert [(names[event["pid"]], event["tid"], event["name"]) for event in events] == [
        (span.device, span.stream, str(unplaced(span.action))) for span in found.spans
    ]
    last = events[-2]
    assert (last["name"], last["cat"], last["dur"]) == ("M0", "fit", 0.0)
    assert max(event["ts"] + event["dur"] for event in events) == found.makespan * 1e6
