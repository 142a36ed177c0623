"""The scripts under docs/examples do what they say, each in a process of its own."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDS = {"unet": "torch", "bert": "transformers", "gcn": "torch_geometric"}
LINES = 30


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_and_its_loss_falls(name: str) -> None:
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed; it comes with the extra 'models'")
    script = ROOT / "docs" / "examples" / f"{name}.py"
    start = "import runpy, sys; sys.path.insert(0, sys.argv[1])"
    shim = "import tests.real_models.torchvision_shim" if find_spec("torchvision") is not None else "pass"
    command = [sys.executable, "-c", f"{start}; {shim}; runpy.run_path(sys.argv[2])", str(ROOT), str(script)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", ran.stdout).groups())  # type: ignore[union-attr]
    assert last < first / 2, ran.stdout


def test_every_example_is_short_and_is_run() -> None:
    scripts = sorted((ROOT / "docs" / "examples").glob("*.py"))
    assert {script.stem for script in scripts} == set(NEEDS)
    assert all(len(script.read_text().splitlines()) <= LINES for script in scripts)
