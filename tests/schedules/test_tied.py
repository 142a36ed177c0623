"""Tied parameters that are read late: what schedules say of it, and what waits for what."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dnifx
from dnifx import schedules
from dnifx.errors import ScheduleError
from dnifx.ir import TRANSFERS, Action, Kind, Program
from dnifx.schedules.dependencies import links
from dnifx.schedules.language import unplaced
from dnifx.schedules.tied import read_elsewhere, readers
from tests.schedules.schedule_programs import Gate, Plan, programs

OWNED_LAST = Plan((("a",), ("b",), ("c",)), uses=(("c",), (), ()), gates=(Gate(0, (1,)), Gate(1, (2,))))


def kinds(text: str, *words: str) -> list[str]:
    return [each for each in text.split() if each.startswith(words)]


def test_partitions_that_share_a_parameter_read_it_late() -> None:
    program = OWNED_LAST.program
    found = schedules.lagged(schedules.sequential(program), program, 4)
    assert str(found) == "F0-4 S0 B0 U0 F1 S1 B1 T0-4 M0-4 U1 F2 B2 T1-4 M1-4 U2-4 R2-4"
    schedules.validate(found, program)
    assert schedules.parse(str(found), found.name) == found
    over = str(schedules.transferred(found, program, (0, 0, 1)))
    assert kinds(over, "SEND_B", "RECV_B", "SEND_U", "RECV_U", "R2") == [
        *("SEND_B0@rank0>rank1", "RECV_B0@rank1<rank0", "SEND_U2@rank1>rank0"),
        *("R2-4@rank1", "RECV_U2-4@rank0<rank1"),
    ]
    here = str(schedules.transferred(found, program, (0, 1, 0)))
    assert kinds(here, "SEND_B", "RECV_B", "SEND_U", "RECV_U", "R2") == ["R2-4@rank0"]


@pytest.mark.parametrize(
    ("lag", "tied", "locked", "found"),
    [(4, None, False, 4), (4, None, True, 0), (4, 0, False, 0), (4, 2, True, 2), (0, 3, False, 3), (0, None, False, 0)],
)
def test_how_late_they_are_read(lag: int, tied: int | None, locked: bool, found: int) -> None:
    program = Plan(OWNED_LAST.parameters, OWNED_LAST.uses, (Gate(0, (1,), locked, not locked), Gate(1, (2,)))).program
    assert schedules.tied_lag(program, lag, tied) == found
    assert schedules.Lagged(lag, tied=tied).at(9, program).tied_lag == found


@given(programs(locked=False, imagines=False), st.integers(0, 3), st.integers(1, 5), st.integers(0, 9))
def test_each_update_reaches_each_rank_once_and_so_many_steps_later(
    program: Program, lag: int, tied: int, seed: int
) -> None:
    source, wiring = schedules.Lagged(lag, schedules.random_order(0.6, seed), tied), links(program)
    ranks = tuple(index % 3 for index in wiring.partitions)
    sent, received = Counter[Any](), Counter[Any]()
    try:
        steps = [source.at(step, program) for step in range(25)]
    except ScheduleError:
        return  # an estimator cannot be fitted late
    for step, schedule in enumerate(steps):
        over = schedules.transferred(schedule, program, ranks)
        schedules.validate(over, program, partial=True)
        assert schedules.parse(str(over), over.name) == over
        for action in over.actions:
            if action.kind is Kind.SEND_WEIGHTS:
                sent[step, action.index, action.peer] += 1
            if action.kind is Kind.RECEIVE_WEIGHTS:
                assert action.lag == tied
                received[step - tied, action.index, action.rank] += 1
            if action.kind is Kind.FORWARD:
                assert action.lag == (tied if action.index in readers(wiring) else 0)
    assert {key: count for key, count in received.items() if key[0] >= 0} == {
        key: count for key, count in sent.items() if key[0] + tied < 25
    }
    assert {index for _, index, _ in sent} <= read_elsewhere(wiring)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F0 S0 B0 U0 F1-2 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2", "partition 1 reads no parameter that another one updates"),
        ("F0-2 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2", "Give all of them one lag"),
        ("F0-2 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2-3", "Give all of them one lag"),
        ("F0 S0 B0 U0 F1 S1 B1 T0 M0 U1-2 F2 B2 T1 M1 U2", "partition 1 updates no parameter that another one reads"),
        ("F0-2 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2-2 R1-2", "Remove it"),
        ("F0-2 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2-2 R2", "needs a lag"),
        ("F0-2 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2-2 R2-2 R2-2", "stands twice"),
        ("F0-2 S0 B0 U0 F1 S1 B1 T0 M0 U1 F2 B2 T1 M1 U2-2 R9-2", "Remove it"),
    ],
)
def test_wrong_lags_are_refused(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        schedules.validate(schedules.parse(text), OWNED_LAST.program)


@pytest.mark.parametrize("given", [-1, True, 1.5, "auto"])
def test_what_is_no_number_of_steps_is_refused(given: Any) -> None:
    with pytest.raises(ScheduleError, match="tied_lag="):
        schedules.Lagged(1, tied=given).at(0, OWNED_LAST.program)


def test_a_run_that_was_saved_before_goes_on_as_it_was() -> None:
    source = schedules.Lagged(3)
    old = {name: each for name, each in source.state_dict().items() if name != "tied"}
    source.load_state_dict(old)
    assert (source.lag, source.tied) == (3, 0)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_a_lag_hides_the_way_there_and_back(ranks: tuple[int, int]) -> None:
    program = dnifx.decouple(Tied(), ["a"], args=(torch.randn(2, 4),)).program
    plain = schedules.sequential(program)
    costs = {str(unplaced(action)): 1.0 for action in plain.actions}

    def period(lag: int, tied: int | None, latency: float) -> float:
        late = schedules.lagged(plain, program, lag, tied=tied)
        over = schedules.transferred(late, program, ranks)
        return 1 / schedules.simulate(over, program, costs, 41, schedules.Link(latency=latency)).rate

    quick = period(8, None, 0.0)
    assert period(8, None, 9.0) == pytest.approx(quick, rel=0.02)
    assert period(8, 0, 9.0) == pytest.approx(quick + 18, abs=3)  # what is waited for comes back in each step
    assert period(8, 2, 9.0) == pytest.approx(period(2, None, 9.0), rel=0.1)  # three steps in the way there and back
    assert quick < period(2, None, 9.0) < period(8, 0, 9.0)


def test_a_late_read_waits_for_its_update() -> None:
    program = dnifx.decouple(Tied(), ["a"], args=(torch.randn(2, 4),), gradient="zero").program
    plain = schedules.sequential(program)
    costs = {str(unplaced(action)): 1.0 for action in plain.actions}
    for ranks, lag in (((0, 1), 3), ((0, 1), 1)):
        over = schedules.transferred(schedules.lagged(plain, program, 0, tied=lag), program, ranks)
        assert not {each for each in over.actions if each.kind in TRANSFERS} <= {Action(Kind.RENEW, 1)}
        simulated = schedules.simulate(over, program, costs, 12, schedules.Link(latency=20.0))
        begins = {
            span.step: span.start
            for span in simulated.spans
            if span.action.kind is Kind.FORWARD and span.action.index == 0
        }
        sent = {span.step: span.end for span in simulated.spans if span.action.kind is Kind.SEND_WEIGHTS}
        for step in range(lag + 1, 12):
            assert begins[step] >= sent[step - 1 - lag] + 20
