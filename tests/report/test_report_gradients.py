"""Pictures of compiled nets: the ways of gradients, cuts in time, folded blocks, links to code, notebooks."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.report.dot import to_dot
from dnifx.report.layout import place
from dnifx.report.picture import picture_of
from dnifx.report.svg import DARK, LIGHT, to_svg
from dnifx.runtime.decoupled import DecoupledModule
from tests.report.report_programs import branches, chain
from tests.report.test_report_pictures import on_edge

SVG = "{http://www.w3.org/2000/svg}"


class Reader(nn.Module):
    """A recurrent layer between two linear ones; the state is its input and its second output."""

    def __init__(self, layer: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Linear(4, 8), layer(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        y, memory = self.rnn(self.embed(x), memory)
        return self.out(y), memory


class Keeper(nn.Module):
    """A recurrent layer whose state stays on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 4)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.hidden = self.rnn(x, self.hidden)
        return self.out(y)


class Sizes(nn.Module):
    """Blocks, and code that reads sizes between them."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(blocks))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        flat = x.view(x.size(0) * x.shape[1], -1)
        return self.head(flat).view(x.size(0), x.shape[1], -1)


ZERO = torch.zeros(1, 4, 8)
X = torch.randn(4, 5, 4)
TIMES: dict[str, Callable[[], DecoupledModule]] = {
    "gru": lambda: dnifx.decouple(Reader(nn.GRU), dnifx.Recurrent("memory", "1"), args=(X, ZERO)),
    "lstm": lambda: dnifx.decouple(Reader(nn.LSTM), ["embed", dnifx.Recurrent("memory", "1")], args=(X, (ZERO, ZERO))),
    "rnn": lambda: dnifx.decouple(Reader(nn.RNN), ["rnn", dnifx.Recurrent("memory", "1")], args=(X, ZERO)),
    "kept": lambda: dnifx.decouple(Keeper(), dnifx.Recurrent("self.hidden"), args=(X,)),
}


@cache
def recurrent(name: str) -> DecoupledModule:
    torch.manual_seed(0)
    return TIMES[name]()


@cache
def blocks(number: int, *cuts: str) -> DecoupledModule:
    return dnifx.decouple(Sizes(number), list(cuts), args=(torch.randn(3, 5, 4),))


@pytest.mark.parametrize("name", TIMES)
def test_a_cut_in_time_is_drawn_with_its_estimator(name: str) -> None:
    net = recurrent(name)
    (each,) = net.program.recurrences
    assert each.interface is not None
    picture = picture_of(net.program)
    (gate,) = (gate for gate in picture.gates if gate.key.startswith("time_"))
    assert gate.lines[0] == f"cut in time {each.name}"
    assert any(each.interface.description in line for line in gate.lines)
    assert gate.targets == ("next_0",)
    makes = [box for box in picture.boxes if box.key in gate.sources]
    assert makes
    assert all(set(box.nodes) & set(each.values) for box in makes)
    ends = {box.key: box.detail for box in picture.boxes if box.title == each.name}
    assert ends == {"last_0": "from the last window", "next_0": "to the next window"}
    for text in (to_svg(net.program), to_dot(net.program)):
        assert each.interface.description in text
        assert "to the next window" in text


@pytest.mark.parametrize("program", [chain(), branches(), recurrent("lstm").program], ids=["chain", "branches", "time"])
def test_gradients_go_back_beside_the_values(program: dnifx.ir.Program) -> None:
    picture = picture_of(program)
    drawing = place(picture)
    cuts = [gate for gate in picture.gates if gate.estimates]
    assert cuts
    back = {kind: [route for route in drawing.routes if route.kind == kind] for kind in ("synthetic", "target")}
    assert len(back["synthetic"]) == sum(len(gate.sources) for gate in cuts)
    assert len(back["target"]) == sum(len(gate.targets) for gate in cuts if gate.fits or gate.locked)
    gates = [drawing.gates[gate.key] for gate in cuts]
    for kind, (starts, ends) in {"synthetic": ("gate", "sources"), "target": ("targets", "gate")}.items():
        for route in back[kind]:
            for side, point in ((starts, route.points[0]), (ends, route.points[-1])):
                boxes = [drawing.boxes[key] for gate in cuts for key in getattr(gate, side, ())]
                assert on_edge(point, gates if side == "gate" else boxes)


def test_an_estimator_that_does_not_learn_has_no_target() -> None:
    net = dnifx.decouple(Sizes(2), "h.0", args=(torch.randn(3, 5, 4),), gradient="zero")
    kinds = {route.kind for route in place(picture_of(net.program)).routes}
    assert "synthetic" in kinds
    assert "target" not in kinds
    assert "#177a2f" not in to_dot(net.program)


@pytest.mark.parametrize("number", [5, 8, 12])
def test_equal_blocks_fold(number: int) -> None:
    titles = {box.title: box.detail for box in picture_of(blocks(number, f"h.{number - 1}").program).boxes}
    assert titles[f"h.0 .. h.{number - 1}"].startswith(f"{number} x Sequential")


def test_a_box_says_what_is_in_it() -> None:
    boxes = picture_of(blocks(12, "h.3", "h.5").program).boxes
    titles = [(box.band, box.title, box.detail.split(" f32")[0]) for box in boxes if box.title.startswith("h.")]
    assert titles[0] == (0, "h.0 .. h.3", "4 x Sequential")
    assert [title for band, title, _ in titles if band == 1] == ["h.4", "h.5"]
    assert titles[-1] == (2, "h.6 .. h.11", "6 x Sequential")


def test_sizes_are_not_drawn() -> None:
    net = blocks(2, "h.0")
    picture = picture_of(net.program)
    drawn = {name for box in picture.boxes if 0 <= box.band < 2 for name in box.nodes}
    measures = net.program.measures
    plain = {name for name in measures if not measures[name].tensors}
    assert any(name.startswith("size") for name in plain)
    assert not {name for name in drawn if name in plain and name.startswith(("size", "mul"))}
    assert not [gate for gate in picture.gates if gate.dashed]


def test_several_values_are_named_by_what_makes_them() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.c(torch.cat([a, self.b(a)], -1))

    (gate,) = picture_of(dnifx.decouple(Skip(), "b", args=(torch.randn(3, 4),)).program).gates
    assert gate.lines[:3] == ("cut b: 2 values", "a f32[3, 4]", "b f32[3, 4]")


def test_every_class_has_its_colours_in_light_and_dark() -> None:
    assert LIGHT.keys() == DARK.keys()
    text = to_svg(recurrent("lstm").program)
    root = ElementTree.fromstring(text)
    style = next(root.iter(f"{SVG}style")).text or ""
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    used = {word for item in root.iter() for word in item.get("class", "").split()} - {"dnifx", "name", "title", "head"}
    for word in used - {"line", "gate", "box"}:
        name = word.removeprefix("of-")
        assert f".{name}" in light, name
        assert f".{name}" in dark, name
    assert all(rule.startswith((".dnifx", "@media")) for rule in re.findall(r"[^{}]+(?={)", style) if rule.strip())
    assert 'fill="#' not in text


def test_boxes_link_to_their_lines_of_the_emitted_code(tmp_path: Path) -> None:
    net = blocks(3, "h.0")
    net.to_folder(tmp_path / "a folder")
    model = tmp_path / "a folder" / "model.py"
    lines = model.read_text().splitlines()
    root = ElementTree.fromstring(net.to_svg(model))
    links = [item.get("href", "") for item in root.iter(f"{SVG}a")]
    boxes = [box for box in picture_of(net.program).boxes if 0 <= box.band < 2]
    assert len(links) >= len(boxes)
    for link in links:
        address, _, number = link.partition("#L")
        assert address.endswith("a%20folder/model.py")
        assert re.match(r"\s+\w+ = ", lines[int(number) - 1])
    assert not list(ElementTree.fromstring(net.to_svg()).iter(f"{SVG}a"))
    with pytest.raises(dnifx.DnifxError, match="cannot be read"):
        net.to_svg(tmp_path / "none.py")


def test_notebooks_show_the_picture() -> None:
    net = dnifx.decouple(Sizes(2), "h.0", args=(torch.randn(3, 5, 4),), loss=nn.functional.mse_loss)
    assert net._repr_svg_() == net.to_svg()
    assert net.to_svg() in net._repr_html_()
    assert "2 partitions" in net._repr_html_()
    trainer = net.trainer(torch.optim.Adam)
    assert net.to_svg() in trainer._repr_html_()
