"""The last third of contract 8: an emitted folder trains as the scheduled target does, in a process without dnifx."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dnifx
from dnifx.runtime.decoupled import DecoupledModule
from tests.contracts.running import descend

STEPS = 20
MIRRORS = dnifx.estimators.Suffix(readout="shared", refresh=3, decay=0.9)
SCRIPT = '''
"""Train the packages named on the command line, and save their weights after every step."""
import importlib
import importlib.abc
import sys

import torch
from torch.nn.functional import cross_entropy


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dnifx":
            raise ImportError(f"{name} must not be imported here")


sys.meta_path.insert(0, Refuse())
sys.path.insert(0, ".")
torch.set_num_threads(1)
try:
    import dnifx
except ImportError:
    pass
else:
    raise SystemExit("dnifx could be imported: this proves nothing")

for name in sys.argv[1:]:
    package = importlib.import_module(name)
    x, labels = torch.load(f"{name}.inputs.pt")
    net = package.Net()
    trainer = package.Trainer(net, lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), cross_entropy)
    states = []
    for number in range(STEPS):
        torch.manual_seed(number)
        trainer.step(x, labels, labels)
        states.append({key: tensor.clone() for key, tensor in net.state_dict().items()})
    torch.save(states, f"{name}.states.pt")
'''.replace("STEPS", str(STEPS))


def make_vectors() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


class Tied(nn.Module):
    """A residual round a cut, and a weight that two partitions use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(h + torch.tanh(self.second(h)))  # type: ignore[no-any-return]


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "vectors": (make_vectors, {"cuts": ["2", "5"]}),
    "labels": (make_vectors, {"cuts": ["2", "5"], "context": "label", "num_classes": 3}),
    "tied": (Tied, {"cuts": ["first", "second"]}),
    "suffixes": (make_vectors, {"cuts": ["2", "5"], "gradient": "suffix"}),
    "mirrors": (make_vectors, {"cuts": ["2", "5"], "gradient": MIRRORS}),
    "mixed": (make_vectors, {"cuts": ["2", "5"], "gradient": {"2": MIRRORS, "5": "synthetic"}}),
    "tied_mirrors": (Tied, {"cuts": ["first"], "gradient": MIRRORS}),
}


def make_net(name: str, x: Tensor) -> DecoupledModule:
    torch.manual_seed(3)
    factory, options = PROGRAMS[name]
    return dnifx.decouple(factory(), args=(x,), loss=cross_entropy, **options)


def train_here(net: DecoupledModule, x: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    trainer = net.trainer(descend)
    states = []
    for number in range(STEPS):
        torch.manual_seed(number)
        trainer.step(x, target=labels)
        states.append({name: tensor.detach().clone() for name, tensor in net.state_dict().items()})
    return states


def test_the_folder_trains_bit_for_bit_without_dnifx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    labels = x[:, :3].argmax(1)
    wanted, parameters = {}, {}
    for name in PROGRAMS:
        net = make_net(name, x)
        net.to_folder(tmp_path / name)
        torch.save((x, labels), tmp_path / f"{name}.inputs.pt")
        parameters[name] = {path for path, _ in net.named_parameters()}
        wanted[name] = train_here(net, x, labels)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-I", str(script), *PROGRAMS], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, states in wanted.items():
        found = torch.load(tmp_path / f"{name}.states.pt")
        assert len(found) == STEPS
        for number, (here, there) in enumerate(zip(states, found, strict=True)):
            assert set(there) <= set(here), name
            assert parameters[name] <= set(there), name
            different = [key for key in there if not torch.equal(here[key], there[key])]
            assert not different, f"{name}, step {number}: {different}"
        assert any(not torch.equal(states[0][key], states[-1][key]) for key in states[0])
