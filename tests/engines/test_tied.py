"""Parameters that partitions on several ranks share: the run is that of one process, bit for bit."""

from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.engines import tied_jobs
from tests.engines.pool import Pool
from tests.engines.tied_jobs import Run

SCHEDULES = ("sequential", "fit_every{every=2}", "random_order{p=0.7,seed=3}", "warm_up{steps=2}")


@st.composite
def spread_layers(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """How many ranks there are, and the rank of each layer; every rank has one."""
    count = draw(st.sampled_from([2, 3]))
    layers = draw(st.integers(count, 4))
    rest = draw(st.lists(st.integers(0, count - 1), min_size=layers - count, max_size=layers - count))
    return count, tuple(draw(st.permutations([*range(count), *rest])))


@st.composite
def runs(draw: st.DrawFn) -> tuple[Run, int]:
    """Layers of few weights, in places drawn for each, and how many ranks there are."""
    count, ranks = draw(spread_layers())
    layers = len(ranks)
    kind = draw(st.sampled_from(["layers", "words", "sparse words"]))
    run = Run(
        kind,
        tuple(draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))),
        ranks,
        draw(st.sampled_from(["linear", "zero", "oracle", "suffix"])),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(SCHEDULES)),
        "plain" if kind == "sparse words" else draw(st.sampled_from(["sgd", "adam"])),
        draw(st.sampled_from([1, 1, 2])),
        None if kind == "sparse words" else draw(st.sampled_from([None, 0.1])),
        draw(st.sampled_from([None, None, 0, 1, 3])),
        0.0 if kind == "sparse words" else draw(st.sampled_from([0.0, 0.1])),
    )
    return run, count


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(runs())
def test_shared_parameters_are_those_of_one_process(pool: Pool, drawn: tuple[Run, int]) -> None:
    run, count = drawn
    assert pool.run(tied_jobs.like_one_process, run, count=count) == [""] * count


@st.composite
def copying(draw: st.DrawFn) -> tuple[Run, int]:
    """Layers before a readout, in places drawn for each, whose suffixes copy weights of other ranks."""
    count, ranks = draw(spread_layers())
    layers = len(ranks)
    gradient = draw(st.sampled_from(["copied readout", "running block", "copied all"]))
    # asks the estimator after the last partition was updated, so that it copies the new weights
    updated_first = f"F0 F1 B1 U1 S0 {'M0 ' if gradient == 'running block' else ''}B0 U0"
    run = Run(
        "read words",
        tuple(draw(st.lists(st.integers(0, layers), min_size=layers, max_size=layers))),
        ranks,
        gradient,
        draw(st.integers(0, 2)),
        draw(st.sampled_from((*SCHEDULES, updated_first) if layers == 2 else SCHEDULES)),
        draw(st.sampled_from(["sgd", "adam"])),
        draw(st.sampled_from([1, 1, 2])),
    )
    return run, count


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(copying())
def test_what_estimators_copy_is_that_of_one_process(pool: Pool, drawn: tuple[Run, int]) -> None:
    run, count = drawn
    assert pool.run(tied_jobs.like_one_process, run, count=count) == [""] * count


@pytest.mark.parametrize(
    "run",
    [
        Run("words", (0, 1), (0, 1), "linear", lag=2),
        Run("words", (0, 1, 1), (0, 1, 1), "copied readout", lag=1, optimizer="adam"),
        Run("words", (0, 1), (1, 0), "running readout"),
        Run("layers", (0, 0, 0), (0, 1, 2), "oracle"),
        Run("read words", (0, 1), (0, 1), "copied readout", lag=1),
        Run("read words", (0, 1, 2), (0, 1, 1), "copied readout", schedule="F0 F1 S1 B1 F2 B2 U2 S0 B0 U0 U1"),
        Run("read words", (0, 1, 2), (1, 2, 0), "copied all", optimizer="adam"),
        Run("layers", (0, 1, 0, 1), (0, 1, 1, 0), "linear", lag=1),
        Run("words", (0, 1, 1), (0, 1, 1), "linear", lag=2, tied=4, accumulate=2),
        Run("layers", (0, 0, 0), (0, 1, 2), "linear", lag=2, schedule=SCHEDULES[2]),
        Run("words", (0, 1), (0, 1), "zero", tied=3),
        Run("words", (0, 1), (0, 1), "linear", lag=3, tied=0),
        Run("words", (0, 1), (0, 1), "linear", schedule="F0-2 S0 B0 U0 F1 B1 T0-2 M0-2 U1-2 R1-2"),
    ],
)
def test_a_run_of_shared_parameters_goes_on_from_a_folder(pool: Pool, tmp_path: Path, run: Run) -> None:
    count = max(run.ranks) + 1
    assert pool.run(tied_jobs.like_one_process, run, str(tmp_path), count=count) == [""] * count


@pytest.mark.parametrize(
    "run",
    [
        Run("words", (0, 1), (0, 1), "linear", lag=3),
        Run("layers", (0, 1, 0), (0, 1, 2), "linear", lag=2),
        Run("layers", (0, 0, 0, 1), (0, 1, 1, 2), "suffix", lag=2, schedule=SCHEDULES[2]),
        Run("sparse words", (0, 1, 0), (0, 0, 1), "linear", lag=1, optimizer="plain"),
    ],
)
def test_no_rank_waits_for_a_shared_parameter(pool: Pool, run: Run) -> None:
    count = max(run.ranks) + 1
    assert pool.run(tied_jobs.runs_ahead, run, 7, count=count) == [""] * count


@pytest.mark.parametrize(("places", "lag"), [([0, 1], 0), ([0, 1], 2)])
def test_inputs_for_which_other_partitions_share_a_parameter_are_refused(
    pool: Pool, places: list[int], lag: int
) -> None:
    for said in pool.run(tied_jobs.other_inputs, places, lag, count=2):
        assert "other partitions use 'b.weight'" in said


def test_in_one_process_they_are_refused_where_it_is_read_late() -> None:
    assert tied_jobs.other_inputs(None, 0) == ""
    assert "other partitions use 'b.weight'" in tied_jobs.other_inputs(None, 2)


def test_messages_that_were_taken_are_not_held(pool: Pool) -> None:
    assert max(pool.run(tied_jobs.held_messages, 20, count=2)) < 20
