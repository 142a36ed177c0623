"""The emitted folder: whole or not there, its own imports, structures, tied weights, and what cannot be written."""

import ast
import importlib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnifx
from dnifx.errors import DnifxError
from dnifx.estimators import BoundarySpec
from dnifx.passes.emit import folder as folders
from dnifx.passes.emit.folder_text import features_text
from dnifx.runtime.decoupled import DecoupledModule
from tests.passes.programs import Tied, mlp

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_net(**options: Any) -> DecoupledModule:
    return dnifx.decouple(mlp(6, 8, 3, batch_norm=True), ["2"], args=(X,), loss=F.cross_entropy, **options)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for a package called ``emitted``, importable and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "emitted"
    for name in [name for name in sys.modules if name.split(".")[0] == "emitted"]:
        del sys.modules[name]


def load(place: Path) -> ModuleType:
    importlib.invalidate_caches()
    return importlib.import_module(place.name)


def imports(path: Path) -> set[str]:
    """Return the top-level names of what a file imports from elsewhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_the_folder_holds_a_package_and_its_weights(place: Path) -> None:
    make_net().to_folder(place)
    assert {path.name for path in place.iterdir()} >= {"__init__.py", "model.py", "modules.pt", "interface.py"}
    package = load(place)
    assert set(package.__all__) == {"Net", "Trainer"}


def test_it_imports_torch_and_the_standard_library_alone(place: Path) -> None:
    make_net(gradient={"2": "stale"}, context="label", num_classes=3).to_folder(place)
    found = set().union(*(imports(path) for path in place.glob("*.py")))
    assert "torch" in found
    assert found - {"torch"} <= set(sys.stdlib_module_names)


def test_the_folder_holds_every_file_that_its_files_import(place: Path) -> None:
    make_net().to_folder(place)
    for path in place.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert all((place / f"{node.module}.py").exists() for node in nodes if node.level), path


def test_it_runs_where_nothing_of_dnifx_is_imported(place: Path) -> None:
    make_net().to_folder(place)
    script = (
        "import sys, torch, emitted\n"
        "net = emitted.Net()\n"
        "print(tuple(net(torch.zeros(2, 6)).shape), [name for name in sys.modules if name.startswith('dnifx')])"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=place.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(2, 3) []"


def test_its_forward_and_its_steps_are_the_modules(place: Path) -> None:
    net = make_net(context="label", num_classes=3)
    net.to_folder(place)
    package = load(place)
    emitted = package.Net()
    assert emitted.training is net.training
    trainer, other = net.trainer(sgd), package.Trainer(emitted, sgd, F.cross_entropy)
    for _ in range(3):
        loss, output, _ = other.step(X, Y, Y)
        result = trainer.step(X, target=Y)
        assert torch.equal(output, result.output)
        assert result.loss is not None
        assert torch.equal(loss, result.loss)
    state = net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in emitted.state_dict().items())
    torch.autograd.backward(F.cross_entropy(emitted(X, Y), Y))
    torch.autograd.backward(F.cross_entropy(net(X, context=Y), Y))
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name, parameter in emitted.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0)


def test_a_folder_that_is_there_stays(place: Path) -> None:
    place.mkdir()
    (place / "mine.txt").write_text("precious")
    with pytest.raises(DnifxError, match=r"emitted already exists; give another path, or overwrite=True"):
        make_net().to_folder(place)
    assert [path.name for path in place.iterdir()] == ["mine.txt"]


def test_overwriting_replaces_it_whole(place: Path) -> None:
    make_net().to_folder(place)
    (place / "stale.py").write_text("")
    net = make_net()
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(7)
    net.to_folder(place, overwrite=True)
    assert not (place / "stale.py").exists()
    assert load(place).Net().get_parameter("0.bias")[0] == 7


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_half_way_leaves_what_was_there(place: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if there:
        make_net().to_folder(place)
    before = {path.name: path.read_bytes() for path in place.glob("*") if path.is_file()}

    def fails(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, "save_modules", fails)
    with pytest.raises(DnifxError, match="cannot be written: no space left"):
        make_net().to_folder(place, overwrite=True)
    assert {path.name: path.read_bytes() for path in place.glob("*") if path.is_file()} == before
    assert [path.name for path in place.parent.iterdir()] == (["emitted"] if there else []), "nothing lies about"


def test_folders_above_are_made(tmp_path: Path) -> None:
    make_net().to_folder(str(tmp_path / "a" / "b" / "net"))
    assert (tmp_path / "a" / "b" / "net" / "model.py").exists()


def test_outputs_keep_their_structure(place: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            h = torch.relu(self.first(x))
            y = self.last(h)
            return {"y": y, "inner": (h, [y, None]), "count": 2}

    model = Many()
    dnifx.decouple(model, ["relu"], args=(X,)).to_folder(place)
    got, expected = load(place).Net()(X), model(X)
    assert got.keys() == expected.keys()
    assert got["count"] == 2
    assert type(got["inner"]) is tuple
    assert got["inner"][1][1] is None
    assert torch.equal(got["inner"][0], expected["inner"][0])
    assert torch.equal(got["inner"][1][0], expected["y"])


def test_tied_weights_stay_tied(place: Path) -> None:
    net = dnifx.decouple(Tied(), ["first"], args=(X,), loss=F.mse_loss, gradient="synthetic")
    net.to_folder(place)
    package = load(place)
    emitted = package.Net()
    weights = dict(emitted.named_parameters(remove_duplicate=False))
    assert weights["first.weight"] is weights["second.weight"]
    trainer, other = net.trainer(sgd), package.Trainer(emitted, sgd, F.mse_loss)
    for _ in range(2):
        trainer.step(X, target=X)
        other.step(X, X)
    assert torch.equal(weights["first.weight"], net.get_parameter("first.weight"))


def test_a_weight_that_a_function_shares_with_a_layer_stays_shared(place: Path) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.mix = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.mix(self.embed(tokens).mean(1))), self.embed.weight)

    tokens = torch.arange(12).reshape(4, 3) % 9
    net = dnifx.decouple(Language(), ["mix"], args=(tokens,), loss=F.cross_entropy)
    net.to_folder(place)
    package = load(place)
    emitted = package.Net()
    assert torch.equal(emitted(tokens), net(tokens))
    trainer, other = net.trainer(sgd), package.Trainer(emitted, sgd, F.cross_entropy)
    for _ in range(2):
        trainer.step(tokens, target=Y)
        other.step(tokens, Y)
    assert torch.equal(emitted.get_parameter("embed.weight"), net.get_parameter("embed.weight"))


def test_a_loss_that_sums_is_summed_there_too(place: Path) -> None:
    def each(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")

    net = dnifx.decouple(mlp(6, 8, 3), ["1"], args=(X,), loss=each, reduction="sum")
    net.to_folder(place)
    package = load(place)
    loss, _, _ = package.Trainer(package.Net(), sgd, each).step(X, Y)
    torch.testing.assert_close(loss.detach(), each(net.original(X), Y).sum().detach())


def test_an_estimator_that_cannot_be_traced_is_named(place: Path) -> None:
    class Branches(nn.Module):
        def __init__(self, spec: BoundarySpec) -> None:
            super().__init__()

        def forward(self, values: tuple[Tensor, ...], context: Tensor | None = None) -> tuple[Tensor, ...]:
            return tuple(value * 0 if bool(value.sum() > 0) else value for value in values)

    with pytest.raises(DnifxError, match=r"cut_2 \(Branches\) cannot be written to a folder, since torch.fx cannot"):
        make_net(gradient=Branches).to_folder(place)
    assert not place.exists()


def test_a_module_that_is_kept_whole_and_cannot_be_saved_is_named(place: Path) -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.linear(x)
            return h + float(random.random()) * h

    net = dnifx.decouple(nn.Sequential(Local(), nn.Linear(6, 3)), ["0"], args=(X,))
    assert net.program.capture is not None
    assert [kept.path for kept in net.program.capture.kept] == ["0"]
    with pytest.raises(DnifxError, match=r"modules of the folder cannot be saved: .*define the class of .*Local"):
        net.to_folder(place)
    assert not place.exists()


def test_a_folder_computes_the_features_that_its_estimators_see() -> None:
    plain, labelled = make_net().program, make_net(context="label", num_classes=3).program
    free = make_net(context=lambda target: target, num_classes=3).program
    assert features_text(plain) == "None"
    assert features_text(labelled) == "torch.nn.functional.one_hot(context, 3).to(torch.float32)"
    assert features_text(free) == "context.to(torch.float32)"
