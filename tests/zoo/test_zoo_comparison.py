"""Runs beside each other: one row a variant, mean and spread over the seeds, the options that differ."""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnifx.cli import main
from dnifx.errors import DataError
from dnifx.zoo.recipes import comparison_picture
from dnifx.zoo.recipes.comparison import Comparison, compare
from dnifx.zoo.recipes.pictures import picture

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


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three runs of two variants, which differ in one number."""
    return [
        written(tmp_path / f"lag-{lag}", [variant("cDNI", [lag, lag + 1]), variant("none", [9.0])], {"lag": [lag]})
        for lag in (16, 0, 4)
    ]


def drawn(comparison: Comparison, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draw, and return the axes."""
    pytest.importorskip("matplotlib")
    figures: list[Any] = []

    @contextmanager
    def kept(to: Path, title: str, size: tuple[float, float]) -> Iterator[Any]:
        with picture(to, title, size) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(comparison_picture, "picture", kept)
    comparison_picture.draw_comparison(comparison, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    return axes


def test_runs_that_differ_in_one_number_are_drawn_over_it(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = drawn(compare(runs), tmp_path / "lags.png", monkeypatch)
    assert axes.get_xlabel() == "lag"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4", "16"]
    assert next(list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3) == [0.5, 4.5, 16.5]
    assert [text.get_text() for text in axes.texts] == ["cDNI", "none"]


def test_runs_that_differ_in_more_are_drawn_below_each_other(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = written(tmp_path / "other", [variant("cDNI", [1.0])], {"lag": [4], "data": "digits"})
    same = written(tmp_path / "same", [variant("cDNI", [2.0])], {"lag": [4], "data": "mnist"})
    axes = drawn(compare([other, same]), tmp_path / "both.png", monkeypatch)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["other: cDNI", "same: cDNI"]
    twice = compare([runs[0], runs[0]])
    assert [label.get_text() for label in drawn(twice, tmp_path / "twice.png", monkeypatch).get_yticklabels()][::2] == [
        "lag-16: cDNI",
        "lag-16: cDNI",
    ]


def test_runs_without_a_common_measurement_have_no_picture(tmp_path: Path) -> None:
    one = written(tmp_path / "one", [variant("a", [1.0])], {})
    two = written(tmp_path / "two", [{"name": "b", "runs": [{"seed": 0, "solved": 1.0}]}], {})
    with pytest.raises(DataError, match="share no measurement"):
        comparison_picture.draw_comparison(compare([one, two]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
