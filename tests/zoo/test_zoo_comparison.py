"""Runs beside each other: one row a variant, mean and spread over the seeds, the options that differ."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnifx.cli import main
from dnifx.errors import DataError
from dnifx.zoo.recipes.comparison import compare

RECORDS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


def written(folder: Path, variants: Any, options: Any, key: str = "variants") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({key: variants, "options": options}))
    return folder


def variant(name: str, errors: Sequence[float]) -> dict[str, Any]:
    runs = [{"seed": seed, "test_error": error, "curve": []} for seed, error in enumerate(errors)]
    return {"name": name, "runs": runs}


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["variants", "arms"]),
)
def test_a_row_has_the_mean_and_the_spread(
    tmp_path_factory: pytest.TempPathFactory, errors: list[list[float]], key: str
) -> None:
    base = tmp_path_factory.getbasetemp()
    variants = [variant(f"v{place}", each) for place, each in enumerate(errors)]
    first, second = (
        written(base / "a", variants, {"lr": 1, "out": "a"}, key),
        written(base / "b", variants[:1], {"lr": 2}),
    )
    found = compare([first, second / "results.json"])
    assert [row.variant for row in found.rows] == [f"v{place}" for place in range(len(errors))] + ["v0"]
    for row, each in zip(found.rows, [*errors, errors[0]], strict=True):
        assert row.seeds == len(each)
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        assert row.measures == {"test_error": (statistics.fmean(each), spread)}
    assert found.options == {"lr": (1, 2)}


def test_the_committed_records_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["mnist-depth-backprop-cdni-4", "mnist-depth-dni-4"]
    with pytest.raises(SystemExit):
        main(["compare", *(str(RECORDS / name) for name in names)])
    text = capsys.readouterr().out
    for word in ("backprop", "test error", "mnist-depth-dni-4", "steps: 6000, 40000", "options that differ"):
        assert word in " ".join(text.split())


@pytest.mark.parametrize(
    "name", ["two-clocks-joint", "charlm-unroll-5", "copy-estimators-1e-4", "cifar10-cnn-128-cdni"]
)
def test_records_of_every_kind_are_read(name: str) -> None:
    found = compare([RECORDS / name])
    assert all(row.measures and row.seeds for row in found.rows)
    assert not found.options


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        compare([tmp_path])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        compare([tmp_path])
    others: tuple[Any, ...] = ([], {}, {"variants": [{"name": "a", "runs": []}]})
    for content in others:
        (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="nothing to compare"):
            compare([tmp_path])
