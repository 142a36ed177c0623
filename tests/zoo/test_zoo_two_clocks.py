"""Two clocks: the cell by its equations, the streams' counts, one window as many, and a recipe that resumes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dnifx.errors import OptionError
from dnifx.zoo.cells import BatchNormLSTMCell
from dnifx.zoo.data import Split
from dnifx.zoo.recipes import RECIPES
from dnifx.zoo.recipes.two_clocks import run
from dnifx.zoo.recipes.two_clocks_learners import Decoupled
from dnifx.zoo.recipes.two_clocks_options import Clocks
from dnifx.zoo.recipes.two_clocks_results import ClockPoint, first_at, mean_of
from dnifx.zoo.two_clocks import DigitStreams, TwoClocks, count_errors, count_loss, zero_state

BRIEF: dict[str, Any] = {"data": "digits", "width": 6, "batch": 4, "ticks": 2, "windows": 8, "evaluate_every": 4}


def normalised(value: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    centred = (value - value.mean(0)) / (value.var(0, unbiased=False) + norm.eps).sqrt()
    return centred * norm.weight + (0 if norm.bias is None else norm.bias)


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_the_cell_is_its_equations(seed: int, batch: int) -> None:
    torch.manual_seed(seed)
    cell = BatchNormLSTMCell(3, 4).double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    x, h, c = torch.randn(batch, 3).double(), torch.randn(batch, 4).double(), torch.randn(batch, 4).double()
    gates = normalised(x @ cell.inside.weight.T, cell.norm_inside)
    gates = gates + normalised(h @ cell.across.weight.T, cell.norm_across)
    enter, keep, new, leave = gates.chunk(4, 1)
    memory = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
    hidden = torch.sigmoid(leave) * torch.tanh(normalised(memory, cell.norm_memory))
    assert all(map(torch.allclose, cell(x, (h, c)), (hidden, memory)))


def test_a_cell_that_does_not_normalise_is_an_lstm() -> None:
    torch.manual_seed(0)
    cell, plain = BatchNormLSTMCell(3, 4).eval(), nn.LSTMCell(3, 4)
    for norm in (cell.norm_inside, cell.norm_across, cell.norm_memory):
        norm.eps = 0.0
        nn.init.ones_(norm.weight)
    with torch.no_grad():
        cell.inside.weight.copy_(plain.weight_ih[[*range(4), *range(4, 8), *range(8, 12), *range(12, 16)]])
        cell.across.weight.copy_(plain.weight_hh)
        assert cell.norm_inside.bias is not None
        cell.norm_inside.bias.copy_(plain.bias_ih + plain.bias_hh)
    x, state = torch.randn(5, 3), (torch.randn(5, 4), torch.randn(5, 4))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(cell(x, state), plain(x, state), strict=True))


@settings(max_examples=10)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 99))
def test_streams_count_what_they_show(ticks: int, batch: int, seed: int) -> None:
    digits = Split(torch.arange(10.0)[:, None], torch.arange(10))
    streams, other = (DigitStreams(digits, batch, ticks, seed) for _ in range(2))
    for _ in range(2):
        shown, odd, threes = streams.period()
        classes = shown.long().squeeze(-1).view(ticks, ticks, batch)
        assert torch.equal(odd, (classes % 2).sum(1))
        assert torch.equal(threes, (classes == 3).flatten(0, 1).sum(0))
        windows = [other.window() for _ in range(ticks)]
        assert torch.equal(torch.cat([each[0] for each in windows]), shown)
        assert torch.equal(windows[-1][2], threes)
    saved = streams.state_dict()
    expected = streams.window()
    other.load_state_dict(saved)
    assert all(map(torch.equal, other.window(), expected))


@settings(max_examples=6)
@given(st.integers(2, 4), st.integers(0, 99))
def test_a_period_is_its_windows_one_by_one(ticks: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = TwoClocks(5, width=6, ticks=ticks).double()
    digits = torch.randn(ticks * ticks, 3, 5).double()
    zero = tuple(each.double() for each in zero_state(3, 6))
    odd, threes, *states = model(digits, zero, zero)
    counts, messages, fast = [], [], zero
    for window in digits.split(ticks):
        count, message, fast = model.fast(window, fast)
        counts.append(count)
        messages.append(message)
    said, slow = model.slow(torch.cat(messages), zero)
    assert torch.equal(odd, torch.cat(counts))
    assert torch.equal(threes, said)
    assert all(map(torch.equal, (*states[0], *states[1]), (*fast, *slow)))
    assert odd.shape == (ticks, 3, ticks + 1)
    assert threes.shape == (3, ticks * ticks + 1)


def test_counts_are_compared_by_cross_entropy_and_error() -> None:
    logits, counts = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    each = [functional.cross_entropy(one, target) for one, target in zip(logits, counts, strict=True)]
    assert torch.allclose(count_loss(logits, counts), torch.stack(each).sum())
    model = TwoClocks(1, width=4, ticks=2)
    nn.init.zeros_(model.fast.readout.weight)
    with torch.no_grad():
        model.fast.readout.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    only_odd = Split(torch.ones(2, 1), torch.tensor([1, 2]))
    odd, _ = count_errors(model, DigitStreams(only_odd, 400, 2, 0), periods=4)
    assert 45 < odd < 55
    assert model.training


@pytest.mark.parametrize("resumed", [("cdni",), pytest.param(("joint", "dni", "cdni", "none"), marks=pytest.mark.slow)])
def test_the_recipe_resumes_bit_for_bit(resumed: tuple[str, ...], tmp_path: Path) -> None:
    whole = run(Clocks(**BRIEF, out=tmp_path / "whole", variants=resumed))
    assert [variant.key for variant in whole.variants] == [*resumed]
    run(replace(Clocks(**BRIEF, out=tmp_path / "parts"), windows=4, variants=resumed))
    parts = run(replace(Clocks(**BRIEF, out=tmp_path / "parts"), variants=resumed))
    for one, other in zip(whole.variants, parts.variants, strict=True):
        assert [point.digits for point in one.runs[0].curve] == [8, 16]
        assert one.runs[0].curve == other.runs[0].curve
    saved = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert saved["command"].startswith("dnifx train two-clocks --data digits")
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10000


class Reader(nn.Module):
    """Answers with zeros, and writes down the context that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor | None] = []

    def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
        self.read.append(context)
        return tuple(torch.zeros_like(value) for value in values)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_conditional_variant_is_shown_the_threes_of_the_last_windows(labelled: bool) -> None:
    options, reader = Clocks(**BRIEF), Reader()
    split = Split(torch.rand(9, 4), torch.tensor([3, 1, 3, 2, 5, 3, 7, 8, 9]))
    learner = Decoupled(options, TwoClocks(4, options.width, options.ticks), lambda spec: reader, labelled)
    streams, twin = (DigitStreams(split, options.batch, options.ticks, seed=5) for _ in range(2))
    reader.read.clear()
    learner.period(streams)
    threes = [twin.window()[2] for _ in range(options.ticks)]
    shown = [context.argmax(1) if context is not None else None for context in reader.read]
    assert len(shown) >= options.ticks
    for found, expected in zip(shown, threes, strict=False):
        assert (found is None) if not labelled else (found is not None and found.tolist() == expected.tolist())


def test_a_checkpoint_with_the_former_words_is_resumed(tmp_path: Path) -> None:
    options = Clocks(**BRIEF, variants=("joint",), out=tmp_path)
    run(replace(options, windows=4))
    (path,) = tmp_path.glob("checkpoints/*.pt")
    content = torch.load(path, weights_only=True)
    content["settings"]["arm"] = content["settings"].pop("variant")
    names = ("digits", "loss", "odd", "threes")
    content["state"]["curve"] = [dict(zip(names, point, strict=True)) for point in content["state"]["curve"]]
    torch.save(content, path)
    (resumed,), (whole,) = run(options).variants, run(replace(options, out=None)).variants
    assert resumed.runs[0].curve == whole.runs[0].curve


def test_the_first_place_at_an_error_is_found() -> None:
    curve = tuple(ClockPoint(digits, 0.0, odd, 0.0) for digits, odd in ((10, 30.0), (20, 9.0), (30, 12.0)))
    assert first_at(curve, 10.0) == 20
    assert first_at(curve, 5.0) is None
    assert mean_of([first_at(curve, 10.0), 40]) == "30"
    assert mean_of([2000, None, 3000]) == "2,500 (2 of 3)"
    assert mean_of([None]) == "never"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"windows": 7}, "--windows: got 7, expected a multiple of --ticks 2"),
        ({"evaluate_every": 3}, "--evaluate-every: got 3, expected a multiple"),
        ({"lr": 0.0}, "--lr: got 0.0, expected a rate above 0"),
        ({"width": 0}, "--width: got 0, expected 1 or more"),
        ({"ticks": 1}, "--ticks: got 1, expected 2 or more"),
        ({"variants": ()}, "--variants: got no value, expected one or more"),
    ],
)
def test_options_out_of_range_are_refused(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        run(Clocks(**{**BRIEF, **changed}))
    with pytest.raises(OptionError, match=r"TwoClocks\(\): got ticks=1"):
        TwoClocks(ticks=1)
    assert RECIPES["two-clocks"].read({"variants": "joint,none"}).variants == ("joint", "none")
