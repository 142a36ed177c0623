"""The rate over places: the lag that is enough, shared cores, and many places."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnifx import doctor, schedules
from dnifx.doctor.prediction import ENOUGH, longest_wait, simulated, spread
from dnifx.errors import PlaceError
from dnifx.ir import Program
from dnifx.schedules import Link
from tests.doctor.nets import classifier, sgd, target
from tests.schedules.schedule_programs import Gate, Plan, chain

TIMES = st.integers(1, 20).map(float)
COSTS = {"F": 2.0, "S": 0.5, "B": 3.0, "U": 1.0, "T": 0.0, "M": 1.5}


def known(program: Program, draw: st.DataObject | None = None, beside: float = 0.0) -> doctor.Profile:
    """A profile with the same costs for all partitions, or with drawn ones."""
    actions = schedules.sequential(program).actions
    costs = {str(each): COSTS[each.kind] if draw is None else draw.draw(TIMES) for each in actions}
    return doctor.Profile(8, costs, beside, {})


def tied_chain(count: int) -> Program:
    """Partitions in a row, the first of which reads a parameter of the last."""
    uses = ((f"p{count - 1}",), *(() for _ in range(count - 1)))
    gates = tuple(Gate(index, (index + 1,)) for index in range(count - 1))
    return Plan(tuple((f"p{index}",) for index in range(count)), uses, gates).program


@settings(max_examples=40)
@given(st.integers(2, 4), st.integers(0, 60), st.data())
def test_the_chosen_lag_is_the_smallest_that_is_enough(count: int, latency: int, data: st.DataObject) -> None:
    program = chain(count)
    profile, ranks, link = known(program, data), tuple(range(count)), Link(float(latency), 64.0)
    found = doctor.predict(program, profile, ranks, link)
    longer = doctor.predict(program, profile, ranks, link, lag=2 * found.lag + 6)
    assert found.rate >= ENOUGH * longer.rate * (1 - 1e-9)
    costs = spread(profile, program, ranks)
    assert found.lag <= longest_wait(program, costs, ranks, link)
    if found.lag:
        shorter = simulated(program, costs, ranks, link, found.lag - 1)
        assert shorter.rate < ENOUGH * longer.rate * (1 + 1e-9)


@given(st.integers(2, 4), st.integers(1, 100), st.data())
@settings(max_examples=30)
def test_a_delay_costs_lag_and_no_steps(count: int, latency: int, data: st.DataObject) -> None:
    program = data.draw(st.sampled_from([chain(count), tied_chain(count)]))
    profile, ranks = known(program, data), tuple(range(count))
    near, far = (doctor.predict(program, profile, ranks, Link(each)) for each in (0.0, float(latency)))
    assert far.rate >= ENOUGH * near.rate * (1 - 1e-9)
    assert far.lag >= near.lag


def test_the_slowest_place_sets_the_pace() -> None:
    program = chain(3)
    found = doctor.predict(program, known(program, beside=0.5), (0, 0, 1), Link(7.0))
    assert found.rate == pytest.approx(1 / (2 * sum(COSTS.values()) + 0.5))
    assert found.work == pytest.approx(3 * (2 + 3 + 1) + 2 * (0.5 + 1.5) + 2 * 0.5)
    assert len(found.peaks) == 2


def test_what_a_message_costs_the_places_counts_on_both() -> None:
    program = chain(2)
    link = Link(handling=1 / 128)
    found = doctor.predict(program, known(program), (0, 1), link, lag=4)
    assert found.rate == pytest.approx(1 / (sum(COSTS.values()) + 2))
    assert found.work == pytest.approx(2 * 6 + 2 + 4)


@pytest.mark.parametrize("cores", [0.5, 1, 2, 3, inf])
def test_places_that_share_cores_do_no_more_work_than_these(cores: float) -> None:
    program = chain(3)
    free = doctor.predict(program, known(program), (0, 1, 2), lag=4)
    found = doctor.predict(program, known(program), (0, 1, 2), lag=4, cores=cores)
    assert found.rate == min(free.rate, cores / free.work)


def test_a_narrow_link_bounds_the_rate_whatever_the_lag() -> None:
    program = chain(2)
    found = doctor.predict(program, known(program), (0, 1), Link(0.0, 128 / 40))
    assert found.rate == pytest.approx(1 / 40)


def test_equal_partitions_make_the_same_rate_however_many_they_are() -> None:
    net = classifier()
    profile = doctor.profile(net, sgd, target(), rounds=1)
    found = []
    for count in (2, 16, 128):
        program, costs = doctor.repeated(net.program, profile, count)
        assert len(program.partitions) == count
        found.append(doctor.predict(program, costs, tuple(range(count)), Link(0.0), lag=4))
    assert found[1].rate == pytest.approx(found[2].rate)
    assert found[0].rate >= found[1].rate
    one = max(profile.costs[f"F{index}"] + profile.costs[f"B{index}"] for index in range(2))
    assert found[2].rate < 1 / one


def test_a_chain_of_one_is_refused() -> None:
    net = classifier()
    profile = doctor.profile(net, sgd, target(), rounds=1)
    with pytest.raises(PlaceError, match="needs two of them"):
        doctor.repeated(net.program, profile, 1)
