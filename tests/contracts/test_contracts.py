"""The contracts as properties of random models, random cuts and both targets."""

import pytest
from hypothesis import given, settings

from tests.contracts import checks
from tests.contracts.cases import Case, cases
from tests.contracts.running import TARGETS

BATCH_DEPENDENT = ("dropout", "batch norm")
"""What makes an example's gradient depend on which others are in the batch, or on how large it is."""


@given(cases())
def test_the_forward_is_the_originals(case: Case) -> None:
    checks.check_forward(case)


@given(cases(training=True))
def test_the_scheduled_forward_is_the_originals(case: Case) -> None:
    checks.check_scheduled_forward(case)


@pytest.mark.parametrize("target", TARGETS)
@given(case=cases(training=True))
def test_the_oracle_gives_backprop(target: str, case: Case) -> None:
    checks.check_oracle(case, target)


@pytest.mark.parametrize("target", TARGETS)
@given(case=cases(training=True))
def test_zero_is_a_detach_at_the_cut(target: str, case: Case) -> None:
    checks.check_detached(case, target)


@pytest.mark.parametrize("target", TARGETS)
@given(case=cases(training=True))
def test_a_partition_learns_from_its_synthetic_gradient_alone(target: str, case: Case) -> None:
    checks.check_isolated(case, target)


@pytest.mark.parametrize("target", TARGETS)
@given(case=cases(training=True))
def test_an_estimator_is_fitted_to_the_sum_over_its_consumers(target: str, case: Case) -> None:
    checks.check_targets(case, target)


@pytest.mark.parametrize("target", TARGETS)
@given(case=cases(training=True, without=BATCH_DEPENDENT))
def test_estimates_and_targets_are_per_example(target: str, case: Case) -> None:
    checks.check_per_example(case, target)


@pytest.mark.parametrize("target", TARGETS)
@given(case=cases(training=True))
def test_task_and_estimators_do_not_reach_each_other(target: str, case: Case) -> None:
    checks.check_separate(case, target)


@pytest.mark.parametrize("target", TARGETS)
@given(case=cases(training=True))
def test_the_first_synthetic_gradient_is_zero(target: str, case: Case) -> None:
    checks.check_first_estimate(case, target)


@given(cases(training=True))
def test_both_targets_agree_step_after_step(case: Case) -> None:
    checks.check_targets_agree(case)


@given(cases())
def test_cuts_are_where_they_were_asked_for(case: Case) -> None:
    checks.check_cut(case)


@settings(max_examples=15)
@given(cases(training=True))
def test_a_resumed_run_continues_bit_for_bit(case: Case) -> None:
    checks.check_state(case)
