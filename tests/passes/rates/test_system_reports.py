"""A system of several rates as people and machines read it: in its own names, one firing at a time."""

import json

import pytest
import torch
from hypothesis import given, settings
from rich.console import Console

import dnifx
from dnifx.report.facts import as_dict
from dnifx.report.picture import picture_of
from tests.passes.rates.system_models import Both, Fast, Slow, SystemCase, system_cases


def decoupled() -> dnifx.DecoupledModule:
    torch.manual_seed(0)
    model = Both(Fast("gru", 2, 1), Slow("lstm", 1)).double()
    return SystemCase(model, 2, 3, 4, ("gru", "lstm"), True, True, ("fast.lift", "slow.lift")).decouple()


def test_parts_bear_the_systems_names_and_count_their_own_parameters() -> None:
    net = decoupled()
    facts = json.loads(json.dumps(as_dict(net.program)))
    assert [part["every"] for part in facts["partitions"]] == [1, 1, 3, 3]
    assert [(b["name"], b["producer"], b["consumers"], b["index"], b["messages"]) for b in facts["boundaries"]] == [
        ("fast.lift", "submod_0", ["submod_1"], 0, 1),
        ("slow.lift", "submod_2", ["submod_3"], 1, 1),
        ("fast", "submod_1", ["submod_2"], 2, 3),
    ]
    for module, indices in (("fast", (0, 1)), ("slow", (2, 3))):
        own = sum(parameter.numel() for parameter in net.original.get_submodule(module).parameters())
        assert sum(facts["partitions"][index]["parameters"] for index in indices) == own
    assert facts["notes"][-1].startswith("cut in time at slow_state (f64[4, 4], f64[4, 4], submod_3 to the next")
    assert facts["schedule"].count("|") == 2


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_keeps_to_its_width(width: int) -> None:
    net = decoupled()
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(net)
    shown = captured.get().splitlines()
    assert 70 < max(map(len, shown)) <= width
    for lines in (shown, str(net).splitlines()):
        text = "\n".join(lines)
        assert "3 windows" in text
        assert "3 messages at once" in text
        assert any(line.startswith("period") for line in lines)


@settings(max_examples=8)
@given(system_cases())
def test_every_boundary_is_drawn_between_its_partitions(case: SystemCase) -> None:
    net = case.decouple()
    program = net.program
    assert [len(each.values) for each in program.boundaries] == [len(each.values) for each in net.boundaries]
    picture = picture_of(program)
    bands = {box.key: box.band for box in picture.boxes}
    gates = {gate.key: gate for gate in picture.gates if not gate.dashed}
    in_time = [state for part, own in program.fired() for state in own.recurrences]
    assert set(gates) == {
        *(f"cut_{each.index}" for each in net.boundaries),
        *(f"time_{number}" for number in range(len(in_time))),
    }
    for each in net.boundaries:
        gate = gates[f"cut_{each.index}"]
        assert {bands[key] for key in gate.sources} == {each.producer}
        assert {bands[key] for key in gate.targets} == set(each.consumers)
        assert (f"{each.messages} messages at once" in gate.lines) == (each.messages > 1)
    slow = [band.detail.endswith(f"every {case.every} windows") for band in picture.bands]
    assert slow.count(True) == sum(part.every > 1 for part in net.partitions)
