"""The command line, tried as a person types it, and what its words stand for."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import nn

import dnifx.recipe_commands
from dnifx.cli import main
from dnifx.errors import OptionError
from dnifx.estimators import Synthetic
from dnifx.ir import Edge, Recurrent
from dnifx.loading import (
    Loaded,
    find,
    load_model,
    read_context,
    read_cuts,
    read_every,
    read_gradient,
    read_input,
    read_setting,
)
from dnifx.recipe_commands import recipe_command
from dnifx.zoo import MODELS
from dnifx.zoo.recipes import RECIPES, Recipe, option

MODEL_FILE = """
import torch
from torch import nn
import beside

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, beside.CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

ready = Net()

def called(width=8):
    return Net(width), (torch.zeros(3, 6),)

def text():
    return "no module"
"""


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file with factories; what it imports lies beside it."""
    (tmp_path / "beside.py").write_text("CLASSES = 4\n")
    path = tmp_path / "my_model.py"
    path.write_text(MODEL_FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    return path


def run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """Run the command and return what it printed: on the standard output, or, where it fails, on the error output."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    captured = capsys.readouterr()
    assert left.value.code == code, captured.err
    return captured.out if code == 0 else captured.err


def test_show_prints_partitions_boundaries_and_estimators(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["show", "fcn", "--cuts", "hidden.*"], capsys)
    for word in ("FCN", "4 partitions", "3 boundaries", "submod_3", "classifier", "hidden.2", "Affine("):
        assert word in text


def test_show_cuts_a_zoo_model_where_the_zoo_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert "3 partitions · 2 boundaries" in run(["show", "fcn", "--set", "layers=3"], capsys)


def test_show_writes_each_format(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["show", f"{model_file}:Net", "--cuts", "first,second", "--input", "5x6"]
    assert run([*base, "--format", "dot"], capsys).startswith('digraph "Net" {')
    assert ElementTree.fromstring(run([*base, "-f", "svg"], capsys)).tag.endswith("svg")
    facts = json.loads(run([*base, "-f", "json"], capsys))
    assert [line["name"] for line in facts["boundaries"]] == ["first", "second"]
    assert facts["inputs"][0]["shapes"] == [[5, 6]]


def test_show_writes_to_a_file(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, begin in (("svg", "<svg"), ("rich", "Net"), ("json", "{"), ("dot", "digraph")):
        out = model_file.parent / f"picture.{kind}"
        text = run(["show", "my_model:called", "--cuts", "2", "-f", kind, "--out", str(out)], capsys)
        assert text == f"wrote {out}\n"
        assert out.read_text(encoding="utf-8").startswith(begin)
    assert "cannot be written" in run(["show", "my_model:called", "-c", "2", "-o", "/no/such/file"], capsys, 2)


def test_show_takes_gradient_and_context(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["show", "fcn", "-g", "Synthetic(hidden=0)", "--context", "label"], capsys)
    assert "Synthetic(hidden=0)" in text
    assert "context" in text
    assert "Zero" in run(["show", "fcn", "--gradient", "zero"], capsys)


def test_wrong_cut_lists_the_nearest_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["show", "fcn", "--cuts", "hiden.1"], capsys, 2)
    assert text.startswith("error (CutError): ")
    assert "hidden.1" in text
    assert "Traceback" not in text


def test_no_cuts_names_some(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'first', 'second', 'head'" in run(["code", f"{model_file}:called"], capsys, 2)


def test_a_model_is_shown_before_it_is_cut(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["show", f"{model_file}:called"], capsys)
    assert text.startswith("Net  ")
    assert "--cuts each" in text
    for kind, begin in (("svg", "<svg"), ("json", "{"), ("dot", "digraph")):
        assert run(["show", f"{model_file}:called", "-f", kind], capsys).startswith(begin)


def test_a_picture_links_to_a_folders_code(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [f"{model_file}:called", "--cuts", "first"]
    folder = model_file.parent / "package"
    for words in ([], ["--overwrite"]):
        assert "wrote" in run(["code", *base, "--out", str(folder), *words], capsys)
    assert "--overwrite" in run(["code", *base, "--out", str(folder)], capsys, 2)
    text = run(["show", *base, "-f", "svg", "--code", str(folder / "model.py")], capsys)
    assert "model.py#L" in text


def test_code_prints_plain_python_and_writes_a_package(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["code", f"{model_file}:called", "--cuts", "first"], capsys)
    compile(text, "code", "exec")
    assert "\x1b" not in text
    folder = model_file.parent / "package"
    assert "wrote" in run(["code", "my_model:called", "--cuts", "first", "--out", str(folder)], capsys)
    assert list(folder.glob("*.py"))


def test_schedule_draws_simulates_and_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    text = run(["schedule", "fcn", "--set", "layers=3", "--trace", str(trace)], capsys)
    assert "submod_2" in text
    assert "F0 " in text
    assert "U2" in text
    assert json.loads(trace.read_text())["traceEvents"]
    text = run(["schedule", "fcn", "-s", "layers=3", "--devices", "cuda:0,cuda:1,cuda:2", "--steps", "2"], capsys)
    assert "cuda:2" in text
    assert "ScheduleError" in run(["schedule", "fcn", "--schedule", "sequentiel"], capsys, 2)


def test_schedule_shows_ranks_and_lags(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["schedule", "fcn", "-s", "layers=3", "--ranks", "0,0,1", "--lag", "4"], capsys)
    assert "M0-4@rank0" in text
    assert "SEND_F1@rank0>rank1" in text
    assert "M1-4" in run(["schedule", "fcn", "-s", "layers=3", "--lag", "4"], capsys)
    for wrong in (["--ranks", "0,b"], ["--ranks", "0,1"], ["--lag", "-1"]):
        assert "Error" in run(["schedule", "fcn", "-s", "layers=3", *wrong], capsys, 2)


CLOCKS = ["two-clocks", "--set", "width=8", "--set", "batch=3"]


def test_show_takes_a_system_of_several_rates(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["show", *CLOCKS], capsys)
    for word in (
        "TwoClocks  2 partitions",
        "1 window ",
        "4 windows",
        "4 messages at once",
        "submod_1",
        " | F0 S0 B0 U0 F1 B1 T0 M0 U1",
    ):
        assert word in text
    assert "3 windows" in run(["show", *CLOCKS, "--every", "slow=3"], capsys)
    assert "label (5 classes) of the part that sends" in run(["show", *CLOCKS, "--context", "label"], capsys)
    facts = json.loads(run(["show", *CLOCKS, "-f", "json"], capsys))
    assert [partition["every"] for partition in facts["partitions"]] == [1, 4]
    assert facts["boundaries"][0]["messages"] == 4
    assert "every 4 windows" in run(["show", *CLOCKS, "-f", "dot"], capsys)
    assert ElementTree.fromstring(run(["show", *CLOCKS, "-f", "svg"], capsys)).tag.endswith("svg")
    own = ["show", "my_model:Net", "--input", "1x5x6", "--cuts", "first", "--every", "second=2"]
    text = run(own, capsys)
    assert "first f32[1, 5, 8]    0 -> 1" in text
    assert "2 messages at once" in text


def test_a_system_of_one_rate_is_shown_without_messages(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["show", *CLOCKS, "--every", "slow=1"], capsys)
    assert "2 partitions" in text
    for word in ("messages", "windows", "period"):
        assert word not in text
    assert "sequential: 9 actions" in run(["schedule", *CLOCKS, "--every", "slow=1"], capsys)


def test_a_recurrent_model_is_cut_in_time(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model_file.parent / "cells.py").write_text(
        "import torch\ndef make():\n    return torch.nn.GRU(3, 4), (torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))\n"
    )
    assert "cut in time at hx (" in run(["show", "cells:make", "--cuts", "1~>hx"], capsys)


def test_a_system_that_is_none_says_so(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected NAME=WINDOWS" in run(["show", *CLOCKS, "--every", "slow:4"], capsys, 2)
    assert "nearest: 'slow'" in run(["show", *CLOCKS, "--every", "slwo=4"], capsys, 2)
    assert "Name the modules after which to cut" in run(["show", *CLOCKS, "--cuts", "2"], capsys, 2)
    flat = ["show", "my_model:called", "--cuts", "first", "--every", "second=2"]
    assert "a message is [windows, batch, features, ...]" in run(flat, capsys, 2)


def test_schedule_draws_simulates_and_traces_a_period(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    base = ["schedule", *CLOCKS, "--every", "slow=2"]
    lines = run([*base, "--trace", str(trace)], capsys).splitlines()
    assert lines[0] == "sequential: 13 actions in 2 windows"
    assert lines[2].split() == "submod_0 F0 S0 B0 U0 | F0 S0 B0 U0 T0 M0".split()
    assert "F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 T0 M0 U1" in lines
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each["ph"] == "X"]
    assert [each["args"]["step"] for each in events] == [0] * 4 + [1] * 9
    assert "sequential: 6 steps in" in run([*base, "--steps", "3"], capsys)
    assert "cuda:1" in run([*base, "--devices", "cuda:0,cuda:1"], capsys)
    assert "3 devices were given for 2 partitions" in run([*base, "--devices", "a,b,c"], capsys, 2)
    text = run([*base, "--schedule", "F0 S0 B0 U0 | F0 S0 B0 U0 F1 B1 U1"], capsys)
    assert "11 actions in 2 windows" in text
    assert "F1 is missing" in run([*base, "--schedule", "F0 S0 B0 U0 | F0 S0 B0 U0"], capsys, 2)
    assert "the partitions fire at different rates" in run([*base, "--schedule", "unlocked{p=0.5}"], capsys, 2)


def test_code_prints_a_systems_parts(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["code", *CLOCKS], capsys)
    compile(text, "code", "exec")
    assert "# every 4: one firing" in text
    assert "cannot be written to a folder" in run(["code", *CLOCKS, "--out", "never"], capsys, 2)


def test_zoo_lists_models_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(["zoo"], capsys)
    for name in (*MODELS, *RECIPES):
        assert name in text


def test_train_lists_recipes_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "--help"], ["train"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "fcn" in capsys.readouterr().out
    text = run(["train", "fcn", "--help"], capsys)
    for one in RECIPES["fcn"].parameters:
        assert one.flag in text


@dataclass(frozen=True)
class Few:
    """Options of a recipe for the test."""

    steps: int = option(10, "how many")
    rate: float | None = option(None, "how fast")
    variants: tuple[str, ...] = option(("a",), "which", ("a", "b"))
    loud: bool = option(False, "whether it prints")
    fixed: str = option("no", "not shown")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Few(fixed="yes")),
        (["--steps", "3", "--rate", "0.5"], Few(steps=3, rate=0.5, fixed="yes")),
        (["--variants", "a,b", "--loud"], Few(variants=("a", "b"), loud=True, fixed="yes")),
        (["--no-loud", "--variants", "b"], Few(variants=("b",), fixed="yes")),
    ],
)
def test_train_gives_the_recipe_its_options(
    words: list[str], expected: Few, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Few] = []

    def take(options: Few, console: Console) -> None:
        seen.append(options)

    recipe = Recipe("few", "for a test", Few, take, {"fixed": "yes"})
    monkeypatch.setattr(dnifx.recipe_commands, "RECIPES", {"few": recipe})
    run(["train", "few", *words], capsys)
    assert seen == [expected]


def test_train_refuses_what_the_recipe_does_not_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(options: Few, console: Console) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(
        dnifx.recipe_commands, "RECIPES", {"few": Recipe("few", "for a test", Few, take, {"fixed": "yes"})}
    )
    assert "OptionError" in run(["train", "few", "--variants", "c"], capsys, 2)
    assert "--fixed" in run(["train", "few", "--fixed", "no"], capsys, 2)
    assert "fw" in run(["train", "fw"], capsys, 2)


def test_recipe_command_leaves_defaults_to_the_recipe() -> None:
    seen: list[Few] = []
    recipe = Recipe("few", "for a test", Few, lambda options, console: seen.append(options))
    recipe_command(recipe)(steps=None, rate=None, variants=None, loud=None, fixed=None)
    assert seen == [Few()]


def test_other_exceptions_propagate(model_file: Path) -> None:
    (model_file.parent / "broken.py").write_text("def make():\n    raise RuntimeError('of the user')\n")
    with pytest.raises(RuntimeError, match="of the user"):
        main(["show", "broken.py:make", "--cuts", "2", "--input", "1x1"])


def test_module_and_version() -> None:
    command = [sys.executable, "-m", "dnifx", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent.parent)
    assert done.stdout.startswith("dnifx 0.")


def test_model_is_found_in_the_zoo_a_file_and_a_module(model_file: Path) -> None:
    zoo = load_model("fcn", ["layers=3"])
    assert isinstance(zoo, Loaded)
    assert (zoo.cuts, zoo.classes) == (MODELS["fcn"].cuts, 10)
    assert len(list(zoo.model.get_submodule("hidden").children())) == 2
    wide = load_model("my_model:called", ["width=12"])
    assert wide.model.get_submodule("first").out_features == 12
    assert wide.args[0].shape == (3, 6)
    given = load_model(f"{model_file}:Net", inputs=["5x6"])
    assert (given.args[0].shape, given.cuts) == ((5, 6), None)
    assert isinstance(load_model("my_model:ready", inputs=["5x6"]).model, nn.Module)
    assert find("torch:nn.Linear") is nn.Linear


def test_meta_model_takes_no_memory(model_file: Path) -> None:
    loaded = load_model("my_model:Net", ["width=200000"], ["2x6"], meta=True)
    assert loaded.args[0].is_meta
    assert all(parameter.is_meta for parameter in loaded.model.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "inputs", "message"),
    [
        ("fnc", [], [], "no model 'fnc' in the zoo.*did you mean 'fcn'"),
        ("my_model:Nett", [], ["5x6"], "has no 'Nett'; did you mean 'Net'"),
        ("no_such_module_here:Net", [], ["5x6"], "no module 'no_such_module_here'"),
        ("nowhere.py:Net", [], ["5x6"], "there is no file nowhere.py"),
        ("my_model:text", [], ["5x6"], "returned str, expected a torch.nn.Module"),
        ("my_model:Net", [], [], "no example inputs; give each by --input"),
        ("my_model:Net", ["wdth=3"], ["5x6"], "'wdth'; did you mean 'width'. It takes width=8, given by --set"),
        ("my_model:ready", ["width=3"], ["5x6"], "takes no settings"),
        ("my_model:Net", ["width"], ["5x6"], "expected NAME=VALUE"),
        ("my_model:Net", [], ["5y6"], "--input 5y6: expected sizes"),
        ("my_model:Net", [], ["(5x6,axb)"], "axb.*: expected sizes"),
        ("my_model:Net", [], ["5x6:int65"], "--input 5x6:int65: expected sizes"),
    ],
)
def test_wrong_names_say_what_would_be_right(
    model_file: Path, name: str, settings: list[str], inputs: list[str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        load_model(name, settings, inputs)


def test_missing_import_inside_a_users_module_is_not_hidden(model_file: Path) -> None:
    (model_file.parent / "needy.py").write_text("import something_absent\n")
    with pytest.raises(ModuleNotFoundError, match="something_absent"):
        find("needy:make")


def test_inputs_are_read() -> None:
    key, value = read_input("4x128:int64")
    assert (key, value.shape, value.dtype, int(value.sum())) == (None, (4, 128), torch.int64, 0)
    key, value = read_input("mask=4x2:bool")
    assert (key, value.dtype, bool(value.all())) == ("mask", torch.bool, True)
    assert torch.equal(read_input("3x4")[1], read_input("3X4")[1])
    assert read_input("3:float64")[1].std() > 0
    assert read_input(":int64")[1].shape == ()
    key, pair = read_input("state=(1x4x8,(2:int64, 3x3),)")
    assert (key, pair[0].shape, pair[1][0].dtype, pair[1][1].shape) == ("state", (1, 4, 8), torch.int64, (3, 3))
    assert read_input("(2x3,)")[1][0].shape == (2, 3)


@pytest.mark.parametrize(
    ("texts", "cuts"),
    [
        ([], None),
        (["each"], "each"),
        (["4"], 4),
        (["hidden.*"], "hidden.*"),
        (["a, b,c"], ["a", "b", "c"]),
        (["a", "b.*"], ["a", "b.*"]),
        (["a->b"], [Edge("a", "b")]),
        (["x", "a -> b"], ["x", Edge("a", "b")]),
        (["fast, 2 ~> fast_state", "~>s"], ["fast", Recurrent("fast_state", "2"), Recurrent("s", "")]),
        (["1~>state"], [Recurrent("state", "1")]),
    ],
)
def test_cuts_are_read(texts: list[str], cuts: object) -> None:
    assert read_cuts(texts) == cuts


def test_rates_are_read() -> None:
    assert read_every([]) == {}
    assert read_every(["slow=4"]) == {"slow": 4}
    assert read_every(["a.b = 2, slow=4", "c=6"]) == {"a.b": 2, "slow": 4, "c": 6}


@pytest.mark.parametrize("text", ["slow", "slow=", "=4", "slow=0", "slow=-2", "slow=2.5", "slow=x", "slow=4,", ""])
def test_rates_that_are_none_say_how_they_are_written(text: str) -> None:
    with pytest.raises(OptionError, match=r"--every .*expected NAME=WINDOWS.*--every slow=4"):
        read_every([text])


def test_a_rate_is_given_once() -> None:
    with pytest.raises(OptionError, match="slow was given 2 windows already"):
        read_every(["slow=2", "slow=3"])


def test_a_cut_in_time_names_the_input() -> None:
    with pytest.raises(OptionError, match=r"--cuts 1~>: expected NEXT~>STATE"):
        read_cuts(["fast, 1~>"])


def test_settings_are_literals_or_text() -> None:
    assert read_setting("layers=6") == ("layers", 6)
    assert read_setting("shape=(3, 4)") == ("shape", (3, 4))
    assert read_setting("kind=relu") == ("kind", "relu")


def test_context_is_read() -> None:
    assert [read_context(text) for text in (None, "label")] == [None, "label"]
    with pytest.raises(OptionError, match="expected label"):
        read_context("lable")


def test_estimators_are_read() -> None:
    assert read_gradient("zero") == "zero"
    assert read_gradient("Synthetic(hidden=2, width=7)") == Synthetic(hidden=2, width=7)
    for text, message in (
        ("Synthtic(hidden=1)", "did you mean Synthetic"),
        ("Synthetic(1)", "name each setting"),
        ("Synthetic(hidden=", "cannot be read"),
        ("Synthetic(hiden=1)", "hiden"),
    ):
        with pytest.raises(OptionError, match=message):
            read_gradient(text)
