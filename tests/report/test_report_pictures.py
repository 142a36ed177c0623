"""Pictures: what is collapsed, what is drawn, that text fits, that nothing lies on anything else."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from dnifx.ir import Program
from dnifx.report import strips
from dnifx.report.boxes import box_limit, elide, fitting_depth, runs
from dnifx.report.dot import quote, to_dot
from dnifx.report.grid import Rect, lanes
from dnifx.report.layout import LINE, PAD, Drawing, place
from dnifx.report.picture import INPUTS, Box, Picture, picture_of
from dnifx.report.strips import CHANNEL, WIDEST, column_width, strips_of, text_width, wrapped
from dnifx.report.svg import to_svg
from dnifx.report.ways import Route
from tests.report.report_programs import branches, chain, program_of

SVG = "{http://www.w3.org/2000/svg}"


class Tangle(nn.Module):
    """Linear maps of random earlier values, with masks that carry no gradient."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.maps = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        draw, values = random.Random(self.seed), [x, y]
        for index, module in enumerate(self.maps):
            values.append(torch.relu(module(draw.choice(values))) + draw.choice(values[-7:]))
            if index % 3 == 0:
                values.append(values[-1] * (draw.choice(values) > 0))
        return tuple(values[-3:])


def tangle(seed: int) -> Program:
    """Cut a tangle three times."""
    cuts = {"first": "add_2", "second": "add_5", "third": "add_8"}
    return program_of(Tangle(seed), (torch.zeros(2, 4), torch.zeros(2, 4)), cuts)


PROGRAMS = {"chain": chain(), "branches": branches(), **{f"tangle {seed}": tangle(seed) for seed in range(12)}}


@pytest.fixture(params=[WIDEST, 300.0], ids=["wide", "narrow"])
def widest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give strips their width, or so little that almost every band has several."""
    monkeypatch.setattr("dnifx.report.strips.WIDEST", request.param)


def every_program(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on all programs, on a wide and on a narrow page."""
    each = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
    return each(pytest.mark.usefixtures("widest")(test))


def apart(one: Rect, two: Rect) -> bool:
    return one.right <= two.x or two.right <= one.x or one.bottom <= two.y or two.bottom <= one.y


def inside(inner: Rect, outer: Rect) -> bool:
    return outer.x <= inner.x and inner.right <= outer.right and outer.y <= inner.y and inner.bottom <= outer.bottom


def runs_through(route: Route, rect: Rect) -> bool:
    """Whether a line passes through the inside of a rectangle."""
    return any(
        max(a[0], b[0]) > rect.x + 0.1
        and min(a[0], b[0]) < rect.right - 0.1
        and max(a[1], b[1]) > rect.y + 0.1
        and min(a[1], b[1]) < rect.bottom - 0.1
        for a, b in pairwise(route.points)
    )


def laid_out(program: Program) -> tuple[Picture, Drawing]:
    picture = picture_of(program)
    return picture, place(picture)


@every_program
def test_nothing_lies_on_anything_else(program: Program) -> None:
    _, drawing = laid_out(program)
    for one, two in combinations([*drawing.boxes.values(), *drawing.gates.values()], 2):
        assert apart(one, two)
    for one, two in combinations([*drawing.bands.values(), *drawing.gates.values()], 2):
        assert apart(one, two)


@every_program
def test_every_box_stands_in_its_band_and_everything_on_the_page(program: Program) -> None:
    picture, drawing = laid_out(program)
    page = Rect(0, 0, drawing.width, drawing.height)
    for box in picture.boxes:
        assert inside(drawing.boxes[box.key], drawing.bands[box.band])
    for rect in [*drawing.bands.values(), *drawing.gates.values()]:
        assert inside(rect, page)
    for route in drawing.routes:
        assert all(0 <= x <= page.right and 0 <= y <= page.bottom for x, y in route.points)


@every_program
def test_no_line_runs_through_a_box_or_a_gate(program: Program) -> None:
    _, drawing = laid_out(program)
    for route in drawing.routes:
        for key, rect in {**drawing.boxes, **drawing.gates}.items():
            assert not runs_through(route, rect), (key, route)


@every_program
def test_text_fits(program: Program) -> None:
    picture, drawing = laid_out(program)
    for box in picture.boxes:
        assert max(text_width(box.title), text_width(box.detail)) <= drawing.boxes[box.key].width
    for gate in picture.gates:
        assert max(map(text_width, gate.lines)) <= drawing.gates[gate.key].width
    for band in picture.bands:
        first = min(drawing.boxes[box.key].x for box in picture.boxes if box.band == band.index)
        texts = [band.title, *band.detail.split(" · ")]
        assert all(drawing.bands[band.index].x + 12 + text_width(text) <= first for text in texts)
        assert LINE * len([text for text in texts if text]) + 2 * PAD <= drawing.bands[band.index].height


@every_program
def test_a_band_goes_on_below_where_it_is_wider_than_the_page(program: Program) -> None:
    picture = picture_of(program)
    found = strips_of(picture)
    drawn = [box.key for strip in found for column in strip.columns for box in column]
    assert sorted(drawn) == sorted(box.key for box in picture.boxes)
    for strip in found:
        width = sum(column_width(column) + CHANNEL for column in strip.columns)
        assert width <= strips.WIDEST or len(strip.columns) == 1
    for one, two in pairwise(found):
        together = [*one.columns, *two.columns]
        assert one.band != two.band or sum(column_width(each) + CHANNEL for each in together) > strips.WIDEST


def test_strips_of_a_band_are_about_equally_wide() -> None:
    columns = [
        [Box(f"box {at}", 0, "m" * 20, "", ())] for at in range(8)
    ]  # 164 pixels wide, and 26 apart: 4 to a strip
    assert [len(strip) for strip in wrapped(columns)] == [4, 4]
    assert [len(strip) for strip in wrapped(columns[:5])] == [3, 2]
    assert [len(strip) for strip in wrapped(columns[:4])] == [4]


def on_edge(point: tuple[float, float], rects: list[Rect]) -> bool:
    x, y = point
    return any(rect.x - 0.1 <= x <= rect.right + 0.1 and rect.y - 0.1 <= y <= rect.bottom + 0.1 for rect in rects)


def on_line(point: tuple[float, float], routes: list[Route]) -> bool:
    return any(
        min(a[0], b[0]) <= point[0] <= max(a[0], b[0]) and min(a[1], b[1]) <= point[1] <= max(a[1], b[1])
        for route in routes
        for a, b in pairwise(route.points)
    )


@every_program
def test_lines_begin_and_end_at_what_they_join(program: Program) -> None:
    _, drawing = laid_out(program)
    rects = [*drawing.boxes.values(), *drawing.gates.values()]
    for place_, route in enumerate(drawing.routes):
        alike = [other for other in drawing.routes[:place_] if other.kind == route.kind]
        assert on_edge(route.points[0], rects) or on_line(route.points[0], alike)
        assert on_edge(route.points[-1], rects)


@every_program
def test_no_part_of_a_net_is_drawn_twice(program: Program) -> None:
    _, drawing = laid_out(program)
    outward = [route for route in drawing.routes if route.arrow and route.kind == "cut"]
    for one, two in combinations(outward, 2):
        for a, b in pairwise(one.points):
            for c, d in pairwise(two.points):
                if a[0] == b[0] == c[0] == d[0]:
                    assert min(max(a[1], b[1]), max(c[1], d[1])) <= max(min(a[1], b[1]), min(c[1], d[1])) + 0.1
                if a[1] == b[1] == c[1] == d[1]:
                    assert min(max(a[0], b[0]), max(c[0], d[0])) <= max(min(a[0], b[0]), min(c[0], d[0])) + 0.1


@every_program
def test_every_edge_between_boxes_is_drawn(program: Program) -> None:
    picture = picture_of(program)
    places = {name: box.key for box in picture.boxes for name in box.nodes}
    drawn = {(line.source, line.target) for line in picture.lines}
    drawn |= {(source, target) for gate in picture.gates for source in gate.sources for target in gate.targets}
    assert program.graph is not None
    for node in program.graph.nodes:
        for user in node.users:
            pair = places[node.name], places[user.name]
            assert pair[0] == pair[1] or pair in drawn


def test_modules_are_collapsed_and_operations_between_them_stand_alone() -> None:
    assert runs(["a.0", "a.1", "", "", "a.1", "b"], 1) == [[0, 1], [2], [3], [4], [5]]
    assert runs(["a.0", "a.0", "a.1"], 2) == [[0, 1], [2]]


def test_depth_is_the_greatest_that_fits() -> None:
    paths = [[f"block.{block}.{part}" for block in range(2) for part in "abc"]]
    counts = {depth: len(runs(paths[0], depth)) for depth in (1, 2, 3)}
    assert fitting_depth(paths, lambda depth: counts[depth] <= 6) == 3
    assert fitting_depth(paths, lambda depth: counts[depth] <= 5) == 2
    assert fitting_depth(paths, lambda depth: counts[depth] <= 1) == 1


def test_middle_of_a_long_partition_is_left_out() -> None:
    assert elide([[0], [1]], 3) == ([[0], [1]], None)
    assert elide([[place] for place in range(6)], 3) == ([[0], [1, 2, 3, 4], [5]], 1)


def test_long_partition_keeps_its_ends() -> None:
    layers = (nn.Linear(2 + place, 3 + place) for place in range(40))
    picture = picture_of(program_of(nn.Sequential(*layers), (torch.zeros(1, 2),), {}))
    titles = [box.title for box in picture.boxes if box.band == 0]
    assert len(titles) == box_limit(1) == 8
    assert "… 33 operations" in titles
    assert (titles[0], titles[-1]) == ("0", "39")


def test_cut_bears_its_estimator_and_dashes_mean_no_gradient() -> None:
    picture = picture_of(branches())
    cuts = {gate.lines[0]: gate for gate in picture.gates}
    assert cuts["cut stem"].lines == ("cut stem", "relu f32[8, 16]", "Synthetic(hidden=0) · 272 parameters")
    assert not cuts["cut stem"].dashed
    assert cuts["no gradient"].lines[1] == "gt bool[8, 16]"
    assert cuts["no gradient"].dashed
    dashed = {line.source for line in picture.lines if line.dashed}
    assert dashed == {"input_x", "input_side"}


def test_program_without_interfaces_or_partitions_is_drawn() -> None:
    whole = branches()
    bare = replace(whole, interfaces=())
    assert any("no estimator yet" in gate.lines for gate in picture_of(bare).gates)
    captured = replace(bare, partitions=(), boundaries=(), partition_of={})
    bands = [(band.index, band.title) for band in picture_of(captured).bands]
    assert bands == [(INPUTS, "inputs"), (0, "not partitioned"), (1, "output")]
    assert ElementTree.fromstring(to_svg(captured)).tag == f"{SVG}svg"


def test_locked_interface_is_marked() -> None:
    program = branches()
    locked = replace(program.interfaces[0], locked=True)
    marked = replace(program, interfaces=(locked, *program.interfaces[1:]))
    assert 'label="cut stem\\nrelu f32[8, 16]\\nSynthetic(hidden=0) · 272 parameters\\nlocked"' in to_dot(marked)
    assert "url(#dnifx-locked)" in to_svg(marked)
    assert "url(#dnifx-locked)" not in to_svg(program)


def test_svg_is_xml_that_shows_every_name_and_draws_what_has_no_gradient_dashed() -> None:
    root = ElementTree.fromstring(to_svg(branches()))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for name in ("Branches", "submod_0", "submod_2", "stem", "right.1", "cut right", "gt bool[8, 16]"):
        assert name in texts
    dashed = [path for path in root.iter(f"{SVG}path") if path.get("stroke-dasharray")]
    assert len(dashed) == 5
    assert all(path.get("marker-end") in ("url(#dnifx-plain)", None) for path in dashed)


def test_svg_escapes_what_names_may_hold() -> None:
    program = branches()
    odd = replace(program.boundaries[0], name='a<b> & "c"')
    text = to_svg(replace(program, boundaries=(odd, *program.boundaries[1:])))
    assert 'cut a<b> & "c"' in [item.text for item in ElementTree.fromstring(text).iter(f"{SVG}text")]


def test_dot_has_a_cluster_for_each_partition_and_joins_only_known_nodes() -> None:
    text = to_dot(branches())
    assert re.findall(r"subgraph (\w+)", text) == ["cluster_0", "cluster_1", "cluster_2"]
    known = set(re.findall(r'^ *"(\w+)" \[label', text, re.MULTILINE))
    joined = {name for pair in re.findall(r'"(\w+)" -> "(\w+)"', text) for name in pair}
    assert joined <= known
    assert {"cut_0", "cut_1", "plain_0", "input_x", "output"} <= joined
    assert text.count("{") == text.count("}")


def test_dot_text_is_quoted() -> None:
    assert quote('say "hi"', "", "back\\slash") == '"say \\"hi\\"\\nback\\\\slash"'


def test_lanes_are_shared_only_by_what_does_not_overlap() -> None:
    assert lanes([("a", 0, 50), ("b", 40, 90), ("c", 100, 120), ("d", 200, 300)]) == {"a": 0, "b": 1, "c": 0, "d": 0}


def test_fifty_partitions_stay_as_wide_as_a_few() -> None:
    few, many = place(picture_of(chain(4))), place(picture_of(chain(50)))
    assert many.width <= few.width + 40
    assert len(many.bands) == 52
