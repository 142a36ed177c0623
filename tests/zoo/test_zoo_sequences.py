"""Sequence tasks: their data, their curricula, and recipes that resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dnifx.errors import DataError, OptionError, StateError
from dnifx.zoo.charlm import TextStream, bits_per_character, encoded, read_text
from dnifx.zoo.copy_task import CopyStream
from dnifx.zoo.recipes import RECIPES
from dnifx.zoo.recipes.sequences import run

BRIEF: dict[str, Any] = {"width": 6, "batch": 3, "steps": 6, "evaluate_every": 2, "lr": 1e-2, "unroll": 3}


@given(steps=st.integers(1, 7), repeat=st.booleans(), seed=st.integers(0, 99))
def test_windows_of_any_length_cut_the_same_stream(steps: int, repeat: bool, seed: int) -> None:
    one, other = (CopyStream(repeat, 2, seed) for _ in range(2))
    for stream in (one, other):
        stream.length, stream.repeats = 3, 2
        stream.start()
    whole = one.window(6 * steps)
    parts = [other.window(steps) for _ in range(6)]
    assert torch.equal(whole[0], torch.cat([x for x, _ in parts], 1))
    assert torch.equal(whole[1], torch.cat([y for _, y in parts], 1))


def test_an_episode_is_read_stopped_and_repeated() -> None:
    stream = CopyStream(repeat=True, batch=4, seed=0, characters=3)
    stream.length, stream.repeats = 3, 2
    stream.start()
    x, y = stream.window(11)
    assert torch.equal(x[:, :3, :3].argmax(2), y[:, 4:7])
    assert torch.equal(y[:, 4:7], y[:, 7:10])
    assert y[:, :4].eq(4).all()
    assert y[:, 10].eq(3).all()
    assert x[:, 3, 3].eq(1).all()
    assert x[:, 4:].eq(0).all()
    assert stream.task_length == 9


def test_solved_lengths_climb_the_papers_ladder() -> None:
    stream = CopyStream(repeat=True, batch=2, seed=0, episodes=1)
    ladder = []
    while stream.task_length <= 67:
        ladder.append(stream.task_length)
        _, y = stream.window(stream.x.size(1) - stream.place or 1)
        stream.learned(20 * functional.one_hot(y, stream.outputs).float(), y)
        if stream.solved < ladder[-1]:
            ladder.pop()
    assert ladder == [4, 5, 7, 9, 12, 15, 19, 23, 28, 33, 39, 45, 52, 59, 67]


def test_guessing_solves_nothing() -> None:
    stream = CopyStream(repeat=False, batch=8, seed=0)
    for _ in range(200):
        _, y = stream.window(3)
        stream.learned(torch.zeros(*y.shape, stream.outputs), y)
    assert stream.solved == 0


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(1, 5))
def test_a_stream_goes_on_from_its_place(windows: int, steps: int) -> None:
    stream, other = CopyStream(True, 2, 0), CopyStream(True, 2, 7)
    for _ in range(windows):
        stream.window(steps)
    other.load_state_dict(stream.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(stream.window(20), other.window(20), strict=True))


class Uniform(nn.Module):
    """Says that all of four characters are as likely."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.zeros(*x.shape, 4), state


def test_text_is_numbered_streamed_and_measured(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("train.txt", "valid.txt", "test.txt")]
    for path, content in zip(paths, ("abca" * 40, "cab" * 30, "bd" * 40), strict=True):
        path.write_text(content)
    text = read_text(paths)
    assert text.characters == ("a", "b", "c", "d")
    stream = TextStream(text.train, batch=4)
    x, y = stream.window(5)
    assert x[1, 0] == text.train[40]
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert bits_per_character(Uniform(), text.test, width=3, streams=4, steps=7) == pytest.approx(2.0)
    with pytest.raises(DataError, match="expected three"):
        read_text(paths[:2])
    with pytest.raises(DataError, match="too short for 200 streams"):
        TextStream(text.train, batch=200)
    assert encoded("ab", "a", "b").train.tolist() == [0, 1]


@pytest.mark.parametrize("variant", ["bptt", "dni", "dni-aux"])
def test_a_run_that_stops_goes_on_bit_for_bit(variant: str, tmp_path: Path) -> None:
    recipe = RECIPES["repeat-copy"]
    whole = run(recipe.read({**BRIEF, "variants": variant}))
    run(recipe.read({**BRIEF, "variants": variant, "steps": 4, "out": tmp_path}))
    resumed = run(recipe.read({**BRIEF, "variants": variant, "out": tmp_path}))
    assert resumed.variants[0].runs[0].curve == whole.variants[0].runs[0].curve
    assert (tmp_path / "results.json").exists()
    assert (tmp_path / "curves.png").exists()
    with pytest.raises(StateError, match="other settings"):
        run(recipe.read({**BRIEF, "variants": variant, "width": 7, "out": tmp_path}))


def test_a_character_model_learns_a_text(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("hello world. " * 60)
    options = {
        **BRIEF,
        "text": ",".join(map(str, paths)),
        "variants": "dni",
        "steps": 60,
        "evaluate_every": 20,
        "width": 16,
    }
    (variant,) = run(RECIPES["charlm"].read(options)).variants
    bits = [point.error for point in variant.runs[0].curve]
    assert bits[-1] < bits[0] < 4
    assert "charlm" in run(RECIPES["charlm"].read({**options, "steps": 20})).command


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="--unroll"):
        run(RECIPES["copy"].read({**BRIEF, "unroll": "0"}))
    with pytest.raises(OptionError, match="--lr"):
        run(RECIPES["copy"].read({**BRIEF, "lr": 0}))
    with pytest.raises(OptionError, match="--estimator-lr: got -1"):
        run(RECIPES["copy"].read({**BRIEF, "estimator_lr": -1}))


def test_estimators_have_a_rate_of_their_own() -> None:
    def curves(**options: Any) -> list[Any]:
        return [
            variant.runs[0].curve
            for variant in run(RECIPES["copy"].read({**BRIEF, "variants": "bptt,dni", **options})).variants
        ]

    (bptt, dni), (same, other) = curves(), curves(estimator_lr=1.0)
    assert BRIEF["lr"] != 7e-5
    assert curves(estimator_lr=7e-5) == [bptt, dni]
    assert same == bptt
    assert other != dni
