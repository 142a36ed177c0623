"""Emitted code, compared with files that a person has read."""

import pytest
import torch

from tests.golden import COMMAND, FOLDER, MODULES, emitted

REMEDY = f"the emitted code has changed: look at the difference, and if it is meant, run `{COMMAND}`"


@pytest.mark.parametrize("name", MODULES)
def test_the_emitted_code_is_the_golden_files(name: str) -> None:
    kept = (FOLDER / f"{name}.txt").read_text()
    assert kept.splitlines()[0] == f"# {COMMAND}"
    assert emitted(name) == kept, REMEDY


@pytest.mark.parametrize("name", MODULES)
def test_the_golden_code_runs(name: str) -> None:
    net = MODULES[name]()
    namespace: dict[str, object] = {}
    exec((FOLDER / f"{name}.txt").read_text(), namespace)
    forward = namespace["forward"]
    assert callable(forward)
    (example,) = net.program.args
    context = [torch.arange(len(example)) % 3] if net.program.context else []
    x = torch.rand_like(example)
    assert torch.equal(forward(net, x, *context)[0], net.eval().train()(x, context=context[0] if context else None))


def test_every_golden_file_belongs_to_a_module() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(MODULES)
