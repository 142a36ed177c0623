"""The recipe ``table``: its models, its texts, what a step costs, and variants that resume and are what they say."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from dnifx.errors import DataError, OptionError
from dnifx.zoo import LanguageModel, ResNet, ViT
from dnifx.zoo.recipes import RECIPES
from dnifx.zoo.recipes.live import Line
from dnifx.zoo.recipes.results import Point
from dnifx.zoo.recipes.table import run
from dnifx.zoo.recipes.table_costs import costs_of
from dnifx.zoo.recipes.table_gradients import parameter_cosines
from dnifx.zoo.recipes.table_learners import Backprop, Cut, Variant, candidates, learner
from dnifx.zoo.recipes.table_options import NAMES, Table, complete
from dnifx.zoo.recipes.table_tasks import task_of
from dnifx.zoo.transformer import Block
from dnifx.zoo.words import Windows, numbered, read_words, rows_of

BRIEF: dict[str, Any] = {"model": "fcn", "layers": 2, "width": 6, "batch": 8, "steps": 4, "evaluate_every": 2}
BRIEF_TEXT: dict[str, Any] = {**BRIEF, "model": "lm", "width": 8, "attention": 2, "length": 6}


def brief(**values: Any) -> Table:
    return Table(**{**BRIEF, **values})


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_residual_network_has_its_blocks(blocks: int) -> None:
    model = ResNet((1, 8, 8), blocks=blocks, filters=4)
    assert [len(list(stage.children())) for stage in model.stages] == [blocks] * 3
    images = model.stem(torch.rand(2, 1, 8, 8))
    shapes = []
    for stage in model.stages:
        images = stage(images)
        shapes.append(tuple(images.shape[1:]))
    assert shapes == [(4, 8, 8), (8, 4, 4), (16, 2, 2)]
    convolutions = [one for one in model.modules() if isinstance(one, nn.Conv2d) and one.kernel_size == (3, 3)]
    assert len(convolutions) == 6 * blocks + 1


@settings(max_examples=10)
@given(st.integers(0, 5), st.booleans())
def test_a_language_model_does_not_see_what_comes(place: int, tied: bool) -> None:
    torch.manual_seed(place)
    model = LanguageModel(7, layers=2, width=8, heads=2, length=6, tied=tied)
    text = torch.randint(7, (2, 6))
    other = text.clone()
    other[:, place] = (other[:, place] + 1) % 7
    differs = (model(text) != model(other)).any(-1)
    assert not differs[:, :place].any()
    assert differs[:, place:].all()
    assert (model.readout is None) is tied


def test_models_refuse_sizes_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="blocks=0"):
        ResNet(blocks=0)
    with pytest.raises(OptionError, match="patch=3, expected a number that divides the image, 8 x 8"):
        ViT((1, 8, 8), patch=3)
    with pytest.raises(OptionError, match="heads=3"):
        Block(8, 3, causal=True)


def test_words_are_numbered_by_what_is_frequent(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("the cat, the dog\n" * 20)
    text = read_words(path, vocabulary=4)
    assert text.characters[0] == "<unk>"
    assert text.characters[1] == "the"
    assert len(text.train) + len(text.validation) + len(text.test) == 20 * 6
    assert int(text.train.max()) == 3
    assert numbered(["a"] * 90 + ["b"] * 10, 5).test.tolist() == [0] * 5
    with pytest.raises(DataError, match="give a file of UTF-8 text"):
        read_words(tmp_path / "none", 4)


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 4))
def test_rows_cover_a_text_once(size: int, length: int, batch: int) -> None:
    text = torch.arange(size)
    if size <= length:
        with pytest.raises(DataError, match="too short"):
            list(rows_of(text, length, batch))
        with pytest.raises(DataError, match="too short"):
            Windows(text, batch, length, 0)
        return
    found = list(rows_of(text, length, batch))
    read = torch.cat([inputs.flatten() for inputs, _ in found])
    assert torch.equal(read, text[: len(read)])
    assert size - 1 - length < len(read)
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in found)
    windows = Windows(text, batch, length, 0)
    saved, (inputs, targets) = windows.state_dict(), windows.next()
    assert torch.equal(targets, inputs + 1)
    windows.load_state_dict(saved)
    assert torch.equal(windows.next()[0], inputs)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(1, 5))
def test_a_step_costs_what_its_layers_multiply_and_keep(sizes: Sequence[int], batch: int) -> None:
    model = nn.Sequential(*(layer for ends in itertools.pairwise(sizes) for layer in (nn.Linear(*ends), nn.Tanh())))
    x = torch.randn(batch, sizes[0])
    costs = costs_of(lambda: model(x).sum().backward(), model)
    products = [2 * batch * before * after for before, after in itertools.pairwise(sizes)]
    assert costs.flops == 3 * sum(products) - products[0]
    assert costs.held_bytes == 4 * batch * sum(sizes)


def test_what_is_let_go_is_held_no_longer() -> None:
    model = nn.Linear(5, 5)

    def step() -> None:
        for _ in range(3):
            model(torch.randn(2, 5)).sum().backward()

    assert costs_of(step, model).held_bytes == 4 * 2 * 5


@pytest.mark.parametrize("model", ["fcn", "cnn", "resnet", "vit", "lm"])
def test_heads_add_their_losses_to_backpropagation(model: str) -> None:
    width = 8 if model in ("vit", "lm") else 4
    options = complete(
        brief(model=model, width=width, layers=2 if model == "resnet" else 3, cuts=None, length=6, attention=2)
    )
    task = task_of(options)
    torch.manual_seed(0)
    both = learner(options, candidates("heads", options)[0], task)
    assert isinstance(both, Backprop)
    inputs, targets = task.held_out()
    loss, *others = both._losses(inputs, targets)
    parameters = list(both.model.parameters())
    found = torch.autograd.grad(torch.stack([loss, *others]).sum(), parameters)
    values: dict[str, Tensor] = {}
    hooks = [
        both.model.get_submodule(boundary.name).register_forward_hook(
            lambda _, __, value, name=boundary.name: values.__setitem__(name, value)
        )
        for boundary in both.net.boundaries
    ]
    expected = task.loss(both.model(inputs), targets)
    assert torch.equal(loss, expected)
    for boundary, interface in zip(both.net.boundaries, both.net.program.interfaces, strict=True):
        head: Any = interface.estimator
        expected = expected + task.loss(head.thin(values[boundary.name])[0], targets)
    for hook in hooks:
        hook.remove()
    assert others
    for mine, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "values",
    [{**BRIEF, "variants": tuple(NAMES)}, {**BRIEF_TEXT, "variants": ("backprop", "suffix", "mirrors")}],
    ids=["images", "text"],
)
def test_variants_begin_alike_and_an_interrupted_run_goes_on_bit_for_bit(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(Table(**values, out=tmp_path / "whole"))
    own = tmp_path / "parts"

    def point(line: Line, point: Point, unit: str) -> None:
        if point.step == 2 and line.name == NAMES["suffix"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Line, "point", point)
        with pytest.raises(KeyboardInterrupt):
            run(Table(**values, out=own))
    assert 0 < len(list(own.glob("checkpoints/*.pt"))) < len(values["variants"])
    resumed = run(Table(**values, out=own))
    for mine, theirs in zip(resumed.variants, whole.variants, strict=True):
        assert (mine.scores, mine.cosine) == (theirs.scores, theirs.cosine)
        assert mine.runs[0].curve == theirs.runs[0].curve
        assert (mine.costs, mine.removed) == (theirs.costs, theirs.removed)
    states = [
        torch.load(tmp_path / "whole" / "checkpoints" / f"{key}-0.001-0.001-seed=0.pt")["state"]["stream"]
        for key in ("backprop", "suffix")
    ]
    assert str(states[0]) == str(states[1])


def test_results_tell_gaps_costs_and_locks(tmp_path: Path) -> None:
    results = run(brief(layers=4, variants=("backprop", "heads", "suffix", "zero", "late"), late=1, out=tmp_path))
    backprop, heads, suffix, zero, late = results.variants
    assert zero.cosine == 0
    assert results.gaps(backprop) == [0.0]
    assert results.gaps(suffix) == [own - other for own, other in zip(suffix.scores, backprop.scores, strict=True)]
    assert backprop.cosine == pytest.approx(1)
    assert suffix.cosine is not None
    assert 0 < suffix.cosine < 1
    assert late.cosine is None
    assert late.removed == suffix.removed
    assert replace(results, relative=True).gaps(backprop) == [0.0]
    assert replace(results, variants=(suffix,)).gaps(suffix) is None
    assert backprop.costs.flops < suffix.costs.flops <= heads.costs.flops
    assert (backprop.removed, suffix.removed) == ({}, {"update": 3, "backward": 3})
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["variants"][2]["gap"] == results.gaps(suffix)
    assert saved["command"].startswith("dnifx train table --model fcn")
    assert (tmp_path / "curves.png").exists()
    assert RECIPES["table"].read({"model": "lm", "head_lr": "1e-3,1e-4"}).head_lr == (1e-3, 1e-4)


@pytest.mark.parametrize("key", ["linear", "suffix"])
def test_the_cosine_is_that_of_a_probe(key: str) -> None:
    options = complete(brief(layers=4))
    task = task_of(options)
    torch.manual_seed(0)
    cut = learner(options, candidates(key, options)[0], task)
    assert isinstance(cut, Cut)
    inputs, targets = task.held_out()
    cut.step(inputs, targets)
    probed = cut.trainer.probe(inputs, target=targets).true
    expected = {name: float(found["parameter_cosine"]) for name, found in probed.items()}
    assert parameter_cosines(cut, inputs, targets) == pytest.approx(expected, abs=1e-4)


def test_validation_chooses_rates_from_the_first_seed() -> None:
    results = run(brief(seeds=2, variants=("zero", "linear"), lr=(1e-2, 1e-9), head_lr=(1e-3, 1e-4)))
    zero, linear = results.variants
    assert [len(variant.candidates) for variant in results.variants] == [2, 4]
    assert linear.chosen == min(linear.candidates, key=lambda each: each[1])[0]
    assert zero.runs[0].validation == min(score for _, score in zero.candidates)
    assert candidates("backprop", brief(lr=(0.1,), head_lr=(1e-3, 1e-4))) == [Variant("backprop", 0.1, 0.1)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": "excerpt"}, "--data: got excerpt, but --model fcn reads other data; give digits"),
        ({"model": "lm", "data": "mnist"}, "give shakespeare, excerpt, or --text FILE"),
        ({"text": Path("text")}, "--text is read by --model lm alone"),
        ({"warm_up": 1.0}, "--warm-up: got 1.0"),
        ({"cuts": ()}, "--cuts: got no value"),
        ({"lr": (0.0,)}, "--lr: got 0.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        run(brief(**values))


@pytest.mark.parametrize(("unit", "shown"), [("error %", "error 12.35%"), ("perplexity", "perplexity 12.35")])
def test_the_progress_says_what_is_measured(unit: str, shown: str) -> None:
    with Progress(console=Console(file=StringIO())) as progress:
        line = Line(progress, progress.add_task("suffix", state=""), "suffix", 0, 3)
        line.point(Point(5, 0.5, 12.345678), unit)
        assert progress.tasks[0].fields["state"] == f"seed 3  loss 0.5000  {shown}"
