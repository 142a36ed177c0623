"""The loops of docs/examples/loops: equal to the plain model's under the oracle, to one big batch, and to a run that was not stopped."""

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnifx.errors import InputError
from dnifx.estimators import Oracle, Synthetic

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted((ROOT / "docs" / "examples" / "loops").glob("*.py"))
EXACT: dict[str, dict[str, Any]] = {
    "in_a_plain_loop": {"dtype": torch.float32},
    "in_lightning": {"precision": "32-true"},
    "in_accelerate": {"precision": "no"},
    "in_transformers": {"bf16": False},
}
"""What leaves mixed precision out."""

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(nn.Module):
    """A model without cuts, with what the loops ask of a net."""

    accepts_loss_kwargs = False  # as a net says it: the Trainer divides a mean loss

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def parameter_groups(self, lr: float, estimator_lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "lr": lr}]

    def model_parameters(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)


def load(path: Path) -> ModuleType:
    """Return a script as a module."""
    spec = spec_from_file_location(f"loops_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=SCRIPTS, ids=[each.stem for each in SCRIPTS])
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Return one of the scripts."""
    if request.param.stem == "in_accelerate":  # which keeps the precision of the first accelerator of a process
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    return load(request.param)


def name_of(script: ModuleType) -> str:
    return script.__name__.removeprefix("loops_")


def place(folder: Path, script: ModuleType) -> Path:
    """Return where a script keeps its checkpoint: a folder, or a file."""
    return folder / "last.pt" if name_of(script) == "in_a_plain_loop" else folder


def without_a_net(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what leaves out of a loop what asks for a net."""
    if name_of(script) == "in_lightning":
        return {"callbacks": []}
    if name_of(script) == "in_accelerate":
        return {"tell": lambda accelerator, model: None}
    if name_of(script) == "in_transformers":
        monkeypatch.setattr(script, "ClipModel", lambda norm: script.transformers.TrainerCallback())
        return {"max_grad_norm": 1.0, "remove_unused_columns": False}
    return {}


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(key.endswith(name) and torch.equal(a, b) for (key, a), (name, b) in pairs)


def test_under_the_oracle_it_trains_as_the_plain_model(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, plain = script.make_net(Oracle()), Plain(script.make_model())
    losses = []
    for each in (net, plain):
        given = without_a_net(script, monkeypatch) if each is plain else {}
        folder = tmp_path / type(each).__name__
        folder.mkdir()
        torch.manual_seed(1)
        losses.append(script.train(each, place(folder, script), 2, **given))
    assert losses[0] == losses[1]
    assert same(plain, net.original), "in mixed precision, bit for bit"


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "mixed precision"])
def test_parts_are_one_big_batch(
    exact: bool, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)  # which does not make large what is small
    ended = []
    for parts in (4, 1):
        net = script.make_net(Synthetic(hidden=0), dropout=0.0)
        torch.manual_seed(1)
        for parameter in net.interface_parameters():
            nn.init.normal_(parameter, std=0.1)
        before = {name: each.clone() for name, each in net.named_parameters()}
        folder = tmp_path / str(parts)
        folder.mkdir()
        script.train(net, place(folder, script), 1, parts=parts, **(EXACT[name_of(script)] if exact else {}))
        ended.append({name: each.detach() - before[name] for name, each in net.named_parameters()})
    assert any(name.startswith("interfaces") and bool(each.any()) for name, each in ended[1].items())
    for name, whole in ended[1].items():
        far = (ended[0][name] - whole).norm() / whole.norm().clamp(min=1e-8)
        assert far < (1e-3 if exact else 0.3), name  # half precision rounds; a wrong factor of 4 would be 0.75 or 3


def test_a_stopped_run_goes_on_bit_for_bit(script: ModuleType, tmp_path: Path) -> None:
    nets, losses = {}, {}
    for name, updates in (("whole", 4), ("halves", 2), ("halves", 4)):
        net = script.make_net(Synthetic(hidden=0))
        torch.manual_seed(1 if updates == 2 or name == "whole" else 2)
        (tmp_path / name).mkdir(exist_ok=True)
        losses[name] = script.train(net, place(tmp_path / name, script), updates)
        nets[name] = net
    assert losses["whole"] == losses["halves"]
    assert same(nets["whole"], nets["halves"]), "estimators too"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=[each.stem for each in SCRIPTS])
def test_a_command_goes_on_in_another_process(path: Path, tmp_path: Path) -> None:
    printed = {}
    for name, updates in (("whole", 10), ("halves", 5), ("halves", 10)):
        place(tmp_path / name, load(path)).parent.mkdir(exist_ok=True)
        command = [sys.executable, str(path), str(place(tmp_path / name, load(path))), str(updates)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
        assert ran.returncode == 0, ran.stderr
        printed[name] = ran.stdout.splitlines()[-1]
    assert printed["whole"] == printed["halves"]
    first, last = map(float, printed["whole"].removeprefix("loss ").split(" -> "))
    assert last < first


def test_a_trainer_that_clips_already_is_refused(tmp_path: Path) -> None:
    script = load(next(each for each in SCRIPTS if each.stem == "in_transformers"))
    with pytest.raises(InputError, match="give max_grad_norm=0"):
        script.train(script.make_net(Synthetic(hidden=0)), tmp_path, 1, max_grad_norm=1.0)


def test_every_script_is_short() -> None:
    assert {each.stem for each in SCRIPTS} == set(EXACT)
    assert all(len(each.read_text().splitlines()) <= 100 for each in SCRIPTS)
