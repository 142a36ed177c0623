"""TensorBoard: what a recipe writes for it, read back by its own reader."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dnifx.errors import OptionError
from dnifx.zoo.recipes import delayed_cue
from dnifx.zoo.recipes.feedforward import run
from dnifx.zoo.recipes.sequence_options import Cue
from dnifx.zoo.recipes.settings import Feedforward

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BRIEF = Feedforward(
    width=8,
    estimator_width=8,
    steps=20,
    batch=32,
    seeds=2,
    evaluate_every=10,
    gradient=("backprop", "synthetic"),
    context=("none",),
)


def scalars(folder: Path) -> dict[str, Any]:
    """Return the curves in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_it_gets_the_curves_and_the_measures_of_each_run(tmp_path: Path) -> None:
    results = run(replace(BRIEF, log_dir=tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        *("DNI-seed=0", "DNI-seed=1", "backprop-seed=0", "backprop-seed=1"),
    ]
    for variant in results.variants:
        for each in variant.runs:
            found = scalars(tmp_path / f"{variant.name}-seed={each.seed}")
            assert found["validation"] == [(point.step, pytest.approx(point.error)) for point in each.curve]
            assert found["loss"] == [(point.step, pytest.approx(point.loss)) for point in each.curve]
            looked = [(look.step, pytest.approx(look.boundaries["hidden.0"]["cosine"])) for look in each.looks]
            assert found.get("hidden.0/cosine", []) == looked


def test_it_gets_the_loss_and_the_error_of_each_episode(tmp_path: Path) -> None:
    results = delayed_cue.run(Cue(episodes=3, batch=4, seeds=2, log_dir=tmp_path))
    for name, runs in results.right.items():
        for seed, right in enumerate(runs):
            found = scalars(tmp_path / f"{name.replace(' ', '-')}-seed={seed}")
            errors = [pytest.approx(100 * (1 - share), abs=1e-4) for share in right]
            assert found["validation"] == list(zip((1, 2, 3), errors, strict=True))
            assert [step for step, loss in found["loss"] if loss > 0] == [1, 2, 3]


def test_without_it_the_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match="--log-dir needs TensorBoard: pip install tensorboard"):
        run(replace(BRIEF, log_dir=tmp_path))
    run(replace(BRIEF, seeds=1, gradient=("zero",)))


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"--log-dir .*cannot be written"):
        run(replace(BRIEF, log_dir=tmp_path / "file"))
