"""Contract 11: a run over places equals the run of the same schedule and lag in one process, bit for bit."""

import pickle

from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from tests.contracts.cases import Case, cases
from tests.engines import jobs
from tests.engines.pool import Pool

SCHEDULES = (
    "sequential",
    "sequential",
    "fit_every{every=2}",
    "random_order{p=0.7,seed=3}",
    "warm_up{steps=2}",
    "alternate{true=1,synthetic=2}",
)
WITHOUT = ("dropout",)
"""Every process has random numbers of its own."""


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    cases(training=True, without=WITHOUT),
    st.sampled_from(sorted(jobs.GRADIENTS)),
    st.integers(0, 4),
    st.sampled_from(SCHEDULES),
    st.lists(st.integers(0, 2), min_size=12, max_size=12),
    st.sampled_from([2, 3]),
)
def test_a_run_over_places_is_that_of_one_process(
    pool: Pool, case: Case, gradient: str, lag: int, schedule: str, draws: list[int], count: int
) -> None:
    try:
        pickle.dumps(case)
    except Exception:  # noqa: BLE001 - a cut may be a function
        reject()
    answers = pool.run(jobs.like_one_process, case, gradient, lag, schedule, draws, count=count)
    assert all(isinstance(each, str) for each in answers), answers
    if any(each.startswith("refused") for each in answers):
        assert len(set(answers)) == 1, "all ranks refuse alike"
        reject()
    assert answers == [""] * count, answers
