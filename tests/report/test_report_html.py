"""The page: its data hold the whole program, everything in them leads somewhere, and nothing in it comes from elsewhere."""

import re
from base64 import b64encode
from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from itertools import pairwise

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import dnifx
from dnifx.ir import Program
from dnifx.passes.capture.capture import CaptureGraph
from dnifx.passes.emit.code import uncut_code
from dnifx.passes.measure import MeasureNodes
from dnifx.passes.pipeline import run_passes
from dnifx.report.boxes import drawn_operations
from dnifx.report.facts import operations
from dnifx.report.html import to_html
from dnifx.report.items import WIDEST, unfolded
from dnifx.report.plays import STEPS, plays_of
from dnifx.zoo import MODELS
from tests.report.page_reader import Page, check_data
from tests.report.report_programs import branches, chain, program_of
from tests.report.test_report_gradients import TIMES, blocks, recurrent


class Long(nn.Module):
    """Operations outside of submodules, more than one group holds."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.first, self.length = nn.Linear(4, 4), length

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for _ in range(self.length):
            y = torch.tanh(y) + x
        return y


def labelled() -> Program:
    """A net with an estimator that sees a label, and a locked boundary."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3))
    gradient = {"0": "synthetic", "1": "oracle"}
    net = dnifx.decouple(model, ["0", "1"], args=torch.randn(5, 4), gradient=gradient, context="label", num_classes=3)
    return net.program


def in_time(name: str) -> Program:
    """A net with a cut in time."""
    return recurrent(name).program


PROGRAMS: dict[str, Callable[[], Program]] = {
    "chain": chain,
    "branches": branches,
    "long": lambda: program_of(Long(900), (torch.zeros(2, 4),), {"middle": "add_300"}),
    "labelled": labelled,
    "blocks": lambda: blocks(12, "h.3", "h.7").program,
    **{name: partial(in_time, name) for name in TIMES},
}
every_program = pytest.mark.parametrize("name", PROGRAMS)


@cache
def program(name: str) -> Program:
    return PROGRAMS[name]()


@cache
def page(name: str) -> Page:
    return Page(to_html(program(name)))


@pytest.fixture(scope="module")
def net() -> dnifx.DecoupledModule:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3))
    return dnifx.decouple(model, ["0", "1"], args=torch.randn(5, 4), loss=nn.CrossEntropyLoss())


@every_program
def test_every_operation_is_one_item_in_its_partition_and_its_module(name: str) -> None:
    own, items = program(name), unfolded(program(name)).items
    nodes = {node.name: node for node in own.graph.nodes} if own.graph else {}
    leaves = [item for item in items if item.kind == "operation"]
    wanted = {
        node.name: part.index for part in own.partitions for node in drawn_operations(own, operations(part, nodes))
    }
    assert {item.nodes[0]: item.band for item in leaves} == wanted
    assert len(leaves) == len(wanted)
    for item in items:
        held = [other for other in items if other.parent is not None and items[other.parent] is item]
        if item.kind in ("module", "several", "partition"):
            assert [each for other in held for each in other.nodes] == list(item.nodes)
            assert len(held) <= WIDEST
            assert all(f"{other.path}.".startswith(f"{item.path}." if item.path else "") for other in held)
        else:
            assert not held


@every_program
def test_every_edge_of_the_graph_is_a_way_and_no_other(name: str) -> None:
    own, whole = program(name), unfolded(program(name))
    assert own.graph is not None
    place = {
        node: at for at, item in enumerate(whole.items) if item.kind in ("operation", "end") for node in item.nodes
    }
    ways = {(flow.source, flow.target) for flow in whole.flows}
    gates = {at for at, item in enumerate(whole.items) if item.kind == "gate"}
    through = {(one, two) for one, gate in ways if gate in gates for start, two in ways if start == gate}
    direct = {pair for pair in ways if not gates.intersection(pair)}
    edges = {
        (place[node.name], place[user.name])
        for node in own.graph.nodes
        for user in node.users
        if node.name in place and user.name in place
    }
    kept = {
        place[value] for part, each in own.fired() for one in each.recurrences for value in one.values if value in place
    }
    output = {at for at, item in enumerate(whole.items) if item.title == "output"}
    into_output = {(one, two) for one, two in edges if two in output and one in kept}
    assert direct <= edges
    assert edges - into_output <= direct | through


@every_program
def test_no_way_between_groups_leads_back(name: str) -> None:
    whole = unfolded(program(name))

    def above(at: int) -> list[int]:
        parent = whole.items[at].parent
        return [at, *(above(parent) if parent is not None else [])]

    graphs: dict[int | None, nx.DiGraph] = {}
    for flow in whole.flows:
        one, two = above(flow.source), above(flow.target)
        shared = next((at for at in one if at in two), None)
        start = one[one.index(shared) - 1] if shared is not None else one[-1]
        stop = two[two.index(shared) - 1] if shared is not None else two[-1]
        graphs.setdefault(shared, nx.DiGraph()).add_edge(start, stop)
    assert all(nx.is_directed_acyclic_graph(graph) for graph in graphs.values())


@every_program
def test_everything_in_the_data_leads_somewhere(name: str) -> None:
    check_data(page(name).data)


@every_program
def test_a_page_is_whole_and_lets_nothing_else_in(name: str) -> None:
    text, read = to_html(program(name)), page(name)
    assert text.isascii()
    assert "://" not in text
    assert not re.search(
        r"\b(?:src|href|action|srcset)=|@import|url\((?!#)|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon", text
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\son\w+=", text)
    [policy] = [attributes["content"] for tag, attributes in read.elements if "http-equiv" in attributes]
    assert policy is not None
    [script, style] = [read.texts["script"][1], read.texts["style"][0]]
    assert [tag for tag, _ in read.elements if tag in ("script", "link", "img", "iframe")] == ["script", "script"]
    for kind, own in (("script", script), ("style", style)):
        assert f"{kind}-src 'sha256-{b64encode(sha256(own.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "MIT License" in script
    assert "The above copyright notice and this permission notice shall be included" in script


@pytest.mark.parametrize("name", [*TIMES, "labelled", "blocks"])
def test_a_play_runs_the_schedule(name: str) -> None:
    own = program(name)
    first, *others = plays_of(own)
    assert own.schedule is not None
    assert [act.name for act in first.acts] == str(own.schedule).split()
    assert [play.title.split(",")[0].split(":")[0] for play in others] == ["sequential", "backprop"] * (
        len(own.partitions) > 1
    )
    for play in (first, *others):
        assert {act.step for act in play.acts} == set(range(1 if play is first else STEPS))
        for row in range(len(play.rows)):
            acts = [act for act in play.acts if act.row == row]
            assert all(one.turns[1] <= two.turns[0] and one.costs[1] <= two.costs[0] for one, two in pairwise(acts))
            assert all(act.turns[1] - act.turns[0] == 1 for act in acts)


def test_partitions_on_their_own_devices_overlap_unless_they_are_locked() -> None:
    _, apart, locked = plays_of(program("blocks"))
    ends = [max(act.turns[1] for act in play.acts) for play in (apart, locked)]
    assert ends[0] < ends[1]


def test_the_code_of_an_item_is_what_it_became(net: dnifx.DecoupledModule) -> None:
    data = Page(net.to_html()).data
    check_data(data)
    listing = [each["text"].splitlines() for each in data["code"]]
    for item in data["items"]:
        lines = [line for number, pieces in item["c"] for a, b in pieces for line in listing[number][a - 1 : b]]
        if item["k"] == "operation":
            assert [line.strip().split(" ")[0] for line in lines] == item["n"]
        if item["k"] == "gate":
            number = item["l"][0].removeprefix("cut ")
            assert [line.strip()[:2] for line in lines if "# " in line[:6]] == ["# ", "# ", "# "]
            assert {word for line in lines for word in re.findall(r"cut_(\d)", line)} == {number}
    for act in data["plays"][0]["acts"]:
        [(number, [(first, last)])] = act["c"]
        assert listing[number][first - 1].startswith(f"    # {act['a']}: ")
        assert not any(re.match(r"    # \w+\d+: ", line) for line in listing[number][first:last])


def test_a_system_of_several_rates_has_a_page() -> None:
    clocks = MODELS["two-clocks"]
    model, args = clocks.factory(width=8, batch=2)
    assert clocks.cuts is not None
    data = Page(dnifx.decouple(model, clocks.cuts, args=args, every=clocks.every).to_html()).data
    check_data(data)
    assert "training step, every 4 windows" in [each["title"] for each in data["code"]]
    assert {act["n"] for act in data["plays"][0]["acts"]} == {0, 1, 2, 3}


def test_a_suffix_shows_its_code() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    net = dnifx.decouple(model, "0", args=torch.randn(5, 4), loss=nn.CrossEntropyLoss(), gradient="suffix")
    data = Page(net.to_html()).data
    [gate] = [item for item in data["items"] if item["k"] == "gate"]
    assert [data["code"][number]["title"] for number, _ in gate["c"]] == ["training step", "its thin suffix"]
    assert "def suffix_" in data["code"][gate["c"][1][0]]["text"]


def test_a_schedule_can_be_chosen(net: dnifx.DecoupledModule) -> None:
    [play] = Page(net.to_html("backprop")).data["plays"]
    assert play["title"] == "backprop"


def test_a_model_that_nothing_cuts_has_a_page() -> None:
    given = Program(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (torch.randn(2, 4),))
    captured = run_passes(given, (CaptureGraph(), MeasureNodes()))
    data = Page(to_html(captured, [uncut_code(captured)])).data
    check_data(data)
    assert [item["k"] for item in data["items"]] == ["end", "partition", "operation", "operation", "end"]
    assert not data["plays"]
    assert data["items"][2]["c"] == [[0, [[3, 3]]]]
