"""What a help text and an import load: a help text needs no torch, an import no compiler."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dnifx
import dnifx.zoo

ROOT = Path(__file__).parent.parent.parent
HEAVY = {"networkx", "rich", "torch", "typer"}
COMPILERS = {"torch._dynamo", "torch._inductor", "sympy", "transformers"}

LOSS_OF_ITS_OWN = """
import torch
from dnifx.estimators import BoundarySpec, Critic, LocalLoss
from dnifx.ir import TensorSpec

spec = BoundarySpec("layer", (TensorSpec((1, 2), torch.float32),), context=2, classes=2)
for estimator in (Critic, LocalLoss):
    *_, answer = estimator()(spec)((torch.ones(1, 2),), torch.tensor([[1.0, 0.0]]))
    answer.sum().backward()
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which reports the modules that it imports."""
    command = [sys.executable, "-X", "importtime", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def imported(*words: str) -> set[str]:
    """Return the modules that a Python process imports."""
    return {line.rpartition("|")[2].strip() for line in run(*words).stderr.splitlines()}


@pytest.mark.parametrize(
    "words", ["--help", "--version", *(f"{name} --help" for name in ("show", "code", "zoo", "doctor"))]
)
def test_a_help_text_needs_no_torch(words: str) -> None:
    assert "torch" not in imported("-m", "dnifx", *words.split())


def test_the_help_texts_of_training_need_no_torch() -> None:
    for words in (["train"], ["train", "--help"], *(["train", name, "--help"] for name in ("fcn", "copy"))):
        done = run("-m", "dnifx", *words)
        assert "--help" in done.stdout
        assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]


def test_import_dnifx_loads_nothing_heavy() -> None:
    assert not HEAVY & imported("-c", "import dnifx")


def test_the_public_names_load_no_compiler() -> None:
    found = imported("-c", "from dnifx import *; decouple, estimators.Critic")
    assert "torch" in found
    assert not COMPILERS & found


def test_an_estimator_with_a_loss_of_its_own_runs_without_the_compiler() -> None:
    assert "torch._dynamo" not in imported("-c", LOSS_OF_ITS_OWN)


@pytest.mark.parametrize("package", [dnifx, dnifx.zoo], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package: Any) -> None:
    names = package.__all__
    assert len(set(names)) == len(names)
    assert set(names) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in names)
    with pytest.raises(AttributeError, match=r"module 'dnifx.*' has no attribute 'decuople'"):
        package.decuople  # noqa: B018


def test_type_checkers_see_the_names_where_they_come_from() -> None:
    tree = ast.parse(inspect.getsource(dnifx))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {name.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert {name: place for name, place in seen.items() if place != "dnifx"} == dnifx.MODULES
    assert {*seen, "errors", "DnifxError"} == set(dnifx.__all__)
