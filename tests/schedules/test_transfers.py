"""Schedules over ranks: places, sends and receives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx import schedules
from dnifx.errors import ScheduleError
from dnifx.estimators import Suffix
from dnifx.ir import RECEIVED, SENDS, TRANSFERS, Action, Kind, Program
from dnifx.schedules.clock import moved_bytes, value_bytes
from dnifx.schedules.dependencies import links
from dnifx.schedules.drawing import needs_over_ranks
from dnifx.schedules.language import unplaced
from tests.schedules.schedule_programs import Gate, Plan, chain, programs


def over(text: str, program: Program, *ranks: int) -> str:
    return str(schedules.transferred(schedules.parse(text), program, ranks))


def test_values_and_targets_cross_from_rank_to_rank() -> None:
    found = over("F0 S0 B0 U0 F1 B1 T0 M0 U1", chain(2), 0, 1)
    assert found == (
        "F0@rank0 SEND_F0@rank0>rank1 S0@rank0 B0@rank0 U0@rank0 RECV_F0@rank1<rank0 F1@rank1 B1@rank1 SEND_T0@rank1>rank0 "
        "RECV_T0@rank0<rank1 T0@rank0 M0@rank0 U1@rank1"
    )


def test_a_late_target_is_received_before_its_fit() -> None:
    found = over("F0 S0 B0 U0 F1 B1 T0-4 M0-4 U1", chain(2), 0, 1)
    assert found.endswith("SEND_T0@rank1>rank0 T0-4@rank0 RECV_T0-4@rank0<rank1 M0-4@rank0 U1@rank1")


def test_gradients_of_shared_parameters_cross_and_new_values_come_back() -> None:
    plan = Plan((("a",), ("b",), ("c",)), uses=(("c",), (), ()), gates=(Gate(0, (1,)), Gate(1, (2,))))
    found = over("F0 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2", plan.program, 0, 0, 1)
    crossing = [word for word in found.split() if "_B" in word or "_U" in word]
    assert crossing == ["SEND_B0@rank0>rank1", "RECV_B0@rank1<rank0", "SEND_U2@rank1>rank0", "RECV_U2@rank0<rank1"]
    assert found.endswith("RECV_B0@rank1<rank0 U2@rank1 SEND_U2@rank1>rank0 RECV_U2@rank0<rank1")
    assert "_B" not in over("F0 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2", plan.program, 0, 1, 0)


def test_ranks_that_share_a_parameter_wait_for_the_link() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    program = dnifx.decouple(Tied(), ["a"], args=(torch.randn(2, 4),)).program
    found = schedules.transferred(schedules.sequential(program), program, (0, 1))
    sizes = {str(each): moved_bytes(each, program, value_bytes(program), (0, 1)) for each in found.actions}
    assert [sizes[each] for each in ("SEND_B0@rank0>rank1", "RECV_U1@rank0<rank1")] == [4 * 4 * 4] * 2
    costs = {str(unplaced(action)): 1.0 for action in found.actions if action.kind not in TRANSFERS}
    quick, slow = (
        schedules.simulate(found, program, costs, 9, schedules.Link(latency=latency)).rate for latency in (0.0, 9.0)
    )
    assert 1 / slow == pytest.approx(
        1 / quick + 2 * 9, abs=3
    )  # there with values or gradients, and back with the weight


COPYING = Plan((("a",), ("b",), ("c",)), gates=(Gate(0, (1,), copies=("b", "c"), refresh=3), Gate(1, (2,))))


def test_what_an_estimator_copies_crosses_before_it_is_asked() -> None:
    order = "F0 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2"
    found = over(order, COPYING.program, 0, 1, 2)
    assert found.startswith(
        "F0@rank0 SEND_F0@rank0>rank1 SEND_S0@rank1>rank0 SEND_S0@rank2>rank0 RECV_S0@rank0<rank1 RECV_S0@rank0<rank2 S0@rank0 "
    )
    assert [each for each in over(order, COPYING.program, 0, 0, 1).split() if "_S" in each] == [
        *("SEND_S0@rank1>rank0", "RECV_S0@rank0<rank1"),
    ]
    used_there = replace(COPYING, uses=(("b", "c"), (), ()))
    assert "_S" not in over(order, used_there.program, 0, 1, 2)


def test_copies_are_sent_after_the_update_that_stands_before_the_question() -> None:
    plan = Plan((("a",), ("b",)), gates=(Gate(0, (1,), copies=("b",)),))
    found = over("F0 F1 B1 U1 S0 B0 T0 M0 U0", plan.program, 0, 1)
    assert "U1@rank1 SEND_S0@rank1>rank0 RECV_S0@rank0<rank1 S0@rank0" in found
    early = found.replace("SEND_S0@rank1>rank0 ", "").replace("F1@rank1", "SEND_S0@rank1>rank0 F1@rank1")
    with pytest.raises(ScheduleError, match=r"needs U1 \(update of partition 1\) before it"):
        schedules.validate(schedules.parse(early), plan.program)


def test_copies_take_the_link_in_the_steps_in_which_they_are_made() -> None:
    program = dnifx.decouple(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        ["0"],
        args=(torch.randn(2, 4),),
        gradient=Suffix(blocks=0, readout="shared", refresh=3),
        loss=nn.MSELoss(),
    ).program
    found = schedules.transferred(schedules.sequential(program), program, (0, 1))
    sizes = {str(each): moved_bytes(each, program, value_bytes(program), (0, 1)) for each in found.actions}
    assert sizes["SEND_S0@rank1>rank0"] == sizes["RECV_S0@rank0<rank1"] == 4 * (4 * 3 + 3)
    costs = {str(unplaced(action)): 1.0 for action in found.actions if action.kind not in TRANSFERS}
    simulated = schedules.simulate(found, program, costs, 9, schedules.Link(latency=10.0))
    sent, taken = (
        {span.step: span for span in simulated.spans if span.action.kind is kind}
        for kind in (Kind.SEND_COPIES, Kind.RECEIVE_COPIES)
    )
    assert list(sent) == list(taken) == [0, 3, 6]
    last = {span.step: span.end for span in simulated.spans if str(unplaced(span.action)) == "U1"}
    for step in (3, 6):
        assert sent[step].start >= last[step - 1]
        assert taken[step].end >= sent[step].end + 10


def test_several_ranks_take_a_value_and_send_its_target() -> None:
    program = Plan((("a",), ("b",), ("c",)), gates=(Gate(0, (1, 2)), Gate(1, (2,)))).program
    found = schedules.transferred(schedules.sequential(program), program, (0, 1, 2))
    crossing = [str(action) for action in found.actions if action.kind in TRANSFERS]
    assert set(crossing) >= {"SEND_F0@rank0>rank1", "SEND_F0@rank0>rank2", "SEND_T0@rank2>rank0", "SEND_T0@rank1>rank0"}
    together = schedules.transferred(schedules.sequential(program), program, (0, 1, 1))
    crossing = [str(action) for action in together.actions if action.kind in TRANSFERS]
    assert crossing == ["SEND_F0@rank0>rank1", "RECV_F0@rank1<rank0", "SEND_T0@rank1>rank0", "RECV_T0@rank0<rank1"]


@given(programs(imagines=False), st.data(), st.integers(0, 3))
def test_every_send_is_received_on_any_graph(program: Program, data: st.DataObject, seed: int) -> None:
    ranks = data.draw(st.tuples(*[st.integers(0, 2)] * len(program.partitions)))
    plain = schedules.random_order(0.7, seed).at(0, program)
    found = schedules.transferred(plain, program, ranks)
    schedules.validate(found, program, partial=True)
    assert schedules.parse(str(found), found.name) == found
    assert schedules.ranks_of(found, program) in (ranks, None) or len(plain.actions) == 0
    assert [replace(each, rank=None) for each in found.actions if each.kind not in TRANSFERS] == list(plain.actions)
    sent = [unplaced(each) for each in found.actions if each.kind in SENDS]
    received = [unplaced(each) for each in found.actions if each.kind in TRANSFERS - SENDS]
    mirrored = [Action(RECEIVED[each.kind], each.index, rank=each.peer, peer=each.rank) for each in received]
    assert sorted(map(str, sent)) == sorted(map(str, mirrored))
    position = {unplaced(each): place for place, each in enumerate(found.actions)}
    needed = needs_over_ranks(found, program, links(program))
    assert all(position[need] < position[action] for action, needs in needed.items() for need in needs)


@given(programs(imagines=False, locked=False), st.data())
def test_any_removal_of_a_transfer_is_refused(program: Program, data: st.DataObject) -> None:
    ranks = data.draw(st.tuples(*[st.integers(0, 2)] * len(program.partitions)))
    found = schedules.transferred(schedules.sequential(program), program, ranks)
    crossing = [place for place, action in enumerate(found.actions) if action.kind in TRANSFERS]
    for place in crossing if len(crossing) > 1 else []:
        cut = replace(found, actions=found.actions[:place] + found.actions[place + 1 :])
        with pytest.raises(ScheduleError):
            schedules.validate(cut, program, partial=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F0@rank0 S0@rank0 B0@rank0 U0@rank1 F1@rank1 B1@rank1 T0@rank0 M0@rank0 U1@rank1", "name the same rank"),
        ("F0@rank0 S0@rank0 B0@rank0 U0@rank0 F1 B1 T0@rank0 M0@rank0 U1", "name none"),
        (
            "F0@rank0 S0@rank0 B0@rank0 U0@rank0 SEND_F0@rank0>rank2 F1@rank0 B1@rank0 T0@rank0 M0@rank0 U1@rank0",
            "nothing crosses",
        ),
    ],
)
def test_wrong_ranks_are_refused(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        schedules.validate(schedules.parse(text), chain(2))


def test_ranks_are_drawn_in_rows_of_their_own() -> None:
    program = chain(2)
    picture = str(schedules.grid(schedules.transferred(schedules.sequential(program), program, (0, 1)), program))
    for shown in ("submod_0@rank0", "submod_1@rank1", "SEND_F0>rank1"):
        assert shown in picture


def test_bandwidth_takes_time() -> None:
    program = chain(2)
    found = schedules.transferred(schedules.sequential(program), program, (0, 1))
    costs = {str(unplaced(action)): 1.0 for action in found.actions if action.kind not in TRANSFERS}
    quick = schedules.simulate(found, program, costs)
    slow = schedules.simulate(found, program, costs, link=schedules.Link(bandwidth=8 * 4 * 4.0))
    assert slow.makespan == pytest.approx(quick.makespan + 1)  # rank 0 works on for a second while the values travel
    with pytest.raises(ScheduleError, match="seconds"):
        schedules.simulate(found, program, link=schedules.Link(latency=1.0))


def test_a_rank_sends_one_message_after_the_other_to_whichever_rank() -> None:
    """Rank 1 stands in the middle: its values go on while its gradients go back, over one line."""
    program, steps, line = chain(3), 40, 8 * 4 * 4.0  # bytes of one message
    found = schedules.transferred(
        schedules.lagged(schedules.sequential(program), program, steps // 2), program, (0, 1, 2)
    )
    costs = {str(unplaced(action)): 1e-3 for action in found.actions if action.kind not in TRANSFERS}
    simulation = schedules.simulate(found, program, costs, steps, schedules.Link(bandwidth=line))
    assert {action.rank for action in found.actions if action.kind is Kind.SEND_TARGET} == {1, 2}
    assert 1 / simulation.rate == pytest.approx(2.0, rel=0.05)
