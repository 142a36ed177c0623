"""The rates of what waits for gradients, against what one can work out by hand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnifx.doctor.baselines import SEGMENT, Kind, Stage, data_parallel_rate, order, pipeline_rate, pipeline_work
from dnifx.schedules import Link

KINDS: tuple[Kind, ...] = ("gpipe", "1f1b")
TIMES = st.integers(1, 20).map(float)


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 8), TIMES, TIMES, TIMES)
def test_equal_stages_over_a_link_that_takes_no_time(
    kind: Kind, stages: int, count: int, forward: float, backward: float, update: float
) -> None:
    """The first stage runs first and last: it waits for the ramp, one forward and one backward for each other stage."""
    rate = pipeline_rate(kind, count, [Stage(forward, backward, update)] * stages, Link())
    assert 1 / rate == pytest.approx((count + stages - 1) * (forward + backward) + update)


@given(st.sampled_from(KINDS), TIMES, TIMES, TIMES, TIMES, st.integers(0, 50), st.integers(1, 40))
def test_two_stages_and_one_micro_batch_take_turns(
    kind: Kind, first: float, second: float, back: float, update: float, latency: int, size: int
) -> None:
    """Nothing overlaps but the request for a message, which is under way while the other stage works."""
    link = Link(float(latency), 4.0)
    stages = [Stage(first, back, update, size), Stage(second, back, 0.0)]
    asked = max(0.0, latency - (second + back + latency))
    whole = first + second + 2 * back + update + 2 * (latency + size / 4) + asked
    assert 1 / pipeline_rate(kind, 1, stages, link) == pytest.approx(whole)


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 6), st.data())
def test_work_bounds_the_rate_and_a_link_makes_nothing_faster(
    kind: Kind, stages: int, count: int, data: st.DataObject
) -> None:
    drawn = [Stage(*data.draw(st.tuples(TIMES, TIMES, TIMES)), data.draw(st.integers(0, 9))) for _ in range(stages)]
    links = Link(), Link(1.0), Link(3.0), Link(3.0, 2.0), Link(3.0, 2.0, 0.5)
    rates = [pipeline_rate(kind, count, drawn, link) for link in links]
    slowest = max(count * (each.forward + each.backward) + each.update for each in drawn)
    assert rates[0] <= 1 / slowest * (1 + 1e-9)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(rates))
    assert pipeline_work(count, drawn, links[0]) >= slowest
    assert rates[0] >= 1 / pipeline_work(count, drawn, links[0]) * (1 - 1e-9)


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 8), st.data())
def test_a_stage_runs_every_micro_batch_forward_and_then_backward(
    kind: Kind, stages: int, count: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    found = list(order(kind, stage, stages, count))
    assert [index for what, index in found if what == "F"] == list(range(count))
    assert [index for what, index in found if what == "B"] == list(range(count))
    held = [sum(1 if what == "F" else -1 for what, _ in found[: end + 1]) for end in range(len(found))]
    assert min(held) == 0
    assert max(held) == (count if kind == "gpipe" else min(count, stages - stage))


def test_replicas_average_in_a_ring() -> None:
    assert data_parallel_rate(0.5, 10 * SEGMENT, 1, Link(1.0)) == 2
    assert 1 / data_parallel_rate(0.5, 10 * SEGMENT, 2, Link()) == 0.5
    assert 1 / data_parallel_rate(0.5, 10 * SEGMENT, 2, Link(0.1)) == pytest.approx(0.5 + 2 * 5 * 0.1)
    assert 1 / data_parallel_rate(0.5, 10 * SEGMENT, 4, Link(0.0, SEGMENT)) == pytest.approx(0.5 + 2 * 0.75 * 10)


def test_a_further_micro_batch_waits_until_it_is_asked_for() -> None:
    """A stage asks for the second once it has run the first: a way there and back in the forward and in the backward pass."""
    stages, link = [Stage(1.0, 1.0, 0.0)] * 2, Link(100.0)
    one, two = (1 / pipeline_rate("gpipe", count, stages, link) for count in (1, 2))
    assert two - one == pytest.approx(2 * 200, abs=10)
