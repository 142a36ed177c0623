"""Pictures of curves: names stand apart at the ends of their lines, and ticks can be read."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dnifx.zoo.recipes.pictures import LINE, apart, draw_curves, scale_log


@given(st.lists(st.integers(0, 1000).map(lambda hundredths: hundredths / 100), min_size=1, max_size=12), st.booleans())
@example([10.0, 10.0, 9.9], False)
def test_names_at_the_ends_of_curves_stand_apart_and_in_their_order(ends: list[float], log: bool) -> None:
    axes = Figure().subplots()
    axes.plot([0, 1], [1.0, 10.0])
    if log:
        scale_log(axes)
        ends = [end + 1.0 for end in ends]
    found = apart(axes, {str(place): end for place, end in enumerate(ends)})
    assert list(found) == [str(place) for place in range(len(ends))]
    heights = sorted(found.values())
    assert all(two - one > 0.99 * LINE for one, two in pairwise(heights))
    assert heights[0] >= 0.0
    assert heights[-1] <= 1.0
    by_end = sorted(found, key=lambda name: (ends[int(name)], found[name]))
    assert [found[name] for name in by_end] == heights
    if len(ends) == 1:
        low, high = axes.get_ylim()
        share = (ends[0] - low) / (high - low)
        assert log or found["0"] == pytest.approx(min(max(share, 0.0), 1.0))


@pytest.mark.parametrize(("low", "high"), [(2.1, 2.5), (1.0, 9.0), (7.0, 23.0), (0.003, 40.0), (1e-6, 1.0)])
def test_a_logarithmic_axis_has_plain_numbers(low: float, high: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [low, high])
    scale_log(axes)
    FigureCanvasAgg(figure).draw()
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert 4 <= len(shown) <= 20
    assert all(
        float(text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(tick)
        for text, tick in zip(shown, axes.get_yticks(), strict=True)
    )


def test_each_curve_has_a_line_a_band_and_its_name() -> None:
    axes = Figure().subplots()
    draw_curves(axes, {"one": {1: [2.0, 4.0], 2: [1.0, 3.0]}, "none": {}, "two": {1: [5.0]}}, bottom=0.0)
    assert [list(np.asarray(line.get_ydata())) for line in axes.get_lines()] == [[3.0, 2.0], [5.0]]
    assert len(axes.collections) == 1
    assert [text.get_text() for text in axes.texts] == ["one", "two"]
    assert [text.get_color() for text in axes.texts] == [line.get_color() for line in axes.get_lines()]
    low, high = axes.get_ylim()
    assert low == 0.0
    assert high > 5.0
