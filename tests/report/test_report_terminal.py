"""The terminal's report, the machine-readable form, and numbers as people read them."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

import dnifx
from dnifx.ir import Capture, Kept, Program, count_parameters
from dnifx.report.facts import as_dict, program_facts
from dnifx.report.terminal import SHOWN, ProgramReport, render
from dnifx.units import byte_size, percent, plural, quantity, share_bar, shorten
from tests.report.report_programs import Chain, branches, chain, program_of


def row(text: str, start: str) -> list[str]:
    """Return the columns of the line that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [column.strip() for column in line.split("  ") if column.strip()]


def test_partitions_are_shown_with_what_they_cost() -> None:
    text = render(chain())
    assert row(text, "submod_0") == ["submod_0", "blocks.0", "4", "201 k", "492 k", "194 KiB", "34% ██▊"]
    assert row(text, "submod_3")[:5] == ["submod_3", "head", "2", "2,570", "6,400"]


def test_partition_that_ends_within_a_module_is_shown_by_its_ends() -> None:
    program = program_of(Chain(), (torch.zeros(2, 784),), {"early": "blocks_0_1"})
    assert row(render(program), "submod_0")[1] == "blocks.0.0 .. blocks.0.1"
    assert row(render(program), "submod_1")[1] == "blocks.0.2 .. head"


def test_boundaries_are_shown_with_values_ends_and_estimators() -> None:
    text = render(branches())
    assert row(text, "stem") == ["stem", "relu f32[8, 16]", "0 -> 1, 2", "Synthetic(hidden=0)", "272"]
    assert row(text, "right") == ["right", "add f32[8, 16]", "1 -> 2", "Synthetic(hidden=0)", "272"]


def test_headline_notes_and_what_was_kept_whole_are_shown() -> None:
    text = render(branches())
    assert text.startswith("Branches  3 partitions · 2 boundaries · 17 nodes · 1,156 parameters · 13.4 kFLOP\n")
    assert "inputs    x f32[8, 16], side f32[8, 16]" in text
    assert "capture   symbolic, verified against the original" in text
    assert "  head: TypeError: Proxy cannot be iterated" in text
    assert "  drop: a view that crossed is copied" in text
    assert "  gt bool[8, 16], 0 -> 2" in text


def test_text_has_no_colour_and_keeps_to_its_width() -> None:
    for width in (80, 100, 140):
        text = render(chain(12), width)
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= width
        assert "blocks.10 " in text


def test_rich_prints_the_report_in_colour() -> None:
    console = Console(width=100, force_terminal=True, color_system="standard", legacy_windows=False)
    with console.capture() as captured:
        console.print(ProgramReport(chain()))
    assert "\x1b[" in captured.get()
    assert "submod_3" in captured.get()


@pytest.mark.parametrize(
    ("missing", "there", "gone"),
    [
        ({"interfaces": ()}, "none yet", "Synthetic"),
        ({"interfaces": (), "boundaries": ()}, "submod_0", "boundary"),
        ({"interfaces": (), "boundaries": (), "partitions": ()}, "17 nodes", "submod"),
        ({"interfaces": (), "boundaries": (), "partitions": (), "measures": {}, "capture": None}, "x ?", "capture"),
    ],
)
def test_whatever_is_known_is_shown(missing: dict[str, object], there: str, gone: str) -> None:
    text = render(replace(branches(), **missing))  # type: ignore[arg-type]
    assert there in text
    assert gone not in text


def test_nothing_but_a_model_is_shown() -> None:
    assert render(Program(nn.Linear(2, 3))) == "Linear  0 nodes · 9 parameters"


def test_locked_interface_and_input_model_are_named() -> None:
    program = branches()
    locked = replace(program.interfaces[0], locked=True, input_model=nn.Linear(16, 16))
    text = render(replace(program, interfaces=(locked, *program.interfaces[1:])))
    assert row(text, "stem")[-1] == "locked"
    assert "locked" not in row(text, "right")
    assert "input model Linear, 272" in text


def test_long_lists_are_counted() -> None:
    kept = tuple(Kept(f"part.{index}", "why not") for index in range(SHOWN + 5))
    text = render(replace(branches(), capture=Capture("record", kept, tried=(("export", "it froze"),))))
    assert "… and 5 more" in text
    assert f"part.{SHOWN}:" not in text
    assert "export: it froze" in text


def test_machine_readable_form_is_stable() -> None:
    facts = json.loads(json.dumps(as_dict(branches())))
    assert list(facts) == [
        "format", "model", "inputs", "nodes", "parameters", "flops", "capture", "partitions", "boundaries",
        "without_gradient", "context", "schedule_name", "schedule", "notes",
    ]  # fmt: skip
    assert facts["format"] == 2
    assert facts["partitions"][1]["modules"] == ["left", "right.0", "right.1"]
    assert facts["partitions"][1]["parameters"] == 2 * 272
    assert sum(part["share"] for part in facts["partitions"]) == pytest.approx(1.0)
    assert facts["boundaries"][0] == {
        "name": "stem",
        "index": 0,
        "producer": "submod_0",
        "consumers": ["submod_1", "submod_2"],
        "values": [{"name": "relu", "shapes": [[8, 16]], "dtypes": ["float32"], "bytes": 512, "text": "f32[8, 16]"}],
        "estimator": "Synthetic(hidden=0)",
        "estimator_parameters": 272,
        "estimator_flops": None,
        "reason": None,
        "locked": False,
        "fits": True,
        "input_model": None,
        "input_model_parameters": None,
        "messages": 1,
        "scale": 1.0,
    }
    assert facts["without_gradient"][0]["value"]["name"] == "gt"
    assert facts["without_gradient"][0]["consumers"] == ["submod_2"]


def test_model_input_that_skips_a_partition_is_no_crossing() -> None:
    assert [item.value.name for item in program_facts(branches()).without_gradient] == ["gt"]


def test_shared_and_unsized_parameters_are_counted_once_and_not_at_all() -> None:
    shared = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(shared, shared)) == 12
    unsized = nn.Module()
    unsized.weight = nn.UninitializedParameter()
    assert count_parameters(nn.ModuleList([nn.Linear(2, 2), unsized])) == 6


def test_meta_model_is_shown() -> None:
    with torch.device("meta"):
        model = nn.Linear(100_000, 100_000)
    assert "10,000,100,000 parameters" in render(Program(model))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9_999, "9,999"), (66_048, "66.0 k"), (999_600, "1.00 M"), (1_316_000, "1.32 M"), (3e19, "30000 P")],
)
def test_quantity(number: float, text: str) -> None:
    assert quantity(number) == text


def test_units() -> None:
    assert quantity(1_480_000, "FLOP") == "1.48 MFLOP"
    assert [byte_size(number) for number in (512, 1024, 36_700, 5 * 2**30)] == [
        "512 B",
        "1.00 KiB",
        "35.8 KiB",
        "5.00 GiB",
    ]
    assert [percent(share) for share in (0.0, 0.001, 0.5, 1.0)] == ["0%", "<1%", "50%", "100%"]
    assert [share_bar(share, 4) for share in (0.0, 0.001, 0.5, 0.6, 1.0)] == ["", "▏", "██", "██▍", "████"]
    assert [plural(number, "boundary") for number in (1, 2)] == ["1 boundary", "2 boundaries"]
    assert shorten("encoder.layers.0.attention", 11) == "encod…ntion"
    assert shorten("short", 5) == "short"


def test_printing_a_decoupled_module_shows_the_report() -> None:
    net = dnifx.decouple(Chain(), "blocks.*", args=(torch.zeros(4, 784),), gradient="oracle")
    assert str(net) == render(net.program)
    assert row(str(net), "blocks.1")[-1] == "locked"
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(net)
    assert [line.rstrip() for line in captured.get().splitlines()] == str(net).splitlines()
