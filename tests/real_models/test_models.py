"""The sweep: real models, each cut into four and at named blocks, hold the contracts; the counts may only grow.

``pytest -m models`` runs all of them (extra ``models``); the default suite runs those of ``FAST``.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from rich.console import Console
from rich.table import Table

from dnifx.errors import DnifxError
from tests.real_models.families import FAMILIES
from tests.real_models.model_checks import CHECKS, PARTS, Report, built, chosen_cuts, examine

KINDS = ("4", "named")
PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "torch-geometric": "torch_geometric",
}

HELD = {
    "recurrent": 14,
    "sharing and freezing": 20,
    "memory and dtypes": 16,
    "containers": 12,
    "control flow": 16,
    "generative": 12,
    "torch": 4,
    "torchvision": 42,
    "torchvision tasks": 12,
    "timm convolutional": 52,
    "timm attention": 32,
    "transformers text": 58,
    "transformers sequence to sequence": 8,
    "transformers vision": 18,
    "transformers other": 10,
    "torch-geometric": 18,
}
"""How many of each family's models, with each of the two kinds of cuts, hold every check; fewer fail the sweep.

Counts are those that a run of the whole sweep has shown (``benchmarks/results/models-sweep.txt``).
"""

FAST = (
    ("recurrent", "lstm", "4"),
    ("recurrent", "attention by hand", "named"),
    ("sharing and freezing", "tied", "4"),
    ("sharing and freezing", "lora", "named"),
    ("sharing and freezing", "checkpoint reentrant", "4"),
    ("memory and dtypes", "in place", "named"),
    ("memory and dtypes", "autocast", "4"),
    ("containers", "dataclasses", "named"),
    ("control flow", "experts", "4"),
    ("control flow", "stochastic depth", "named"),
    ("generative", "u-net", "4"),
    ("torch", "encoder", "4"),
    ("generative", "flow", "named"),
    ("transformers text", "gpt2", "named"),
    ("transformers text", "bert", "4"),
    ("transformers text", "distilbert", "named"),
    ("transformers vision", "vit", "named"),
    ("transformers vision", "resnet-hf", "4"),
    ("torch-geometric", "gcn", "4"),
    ("torch-geometric", "graphsage", "named"),
)
"""Family, model and kind of cuts of what the default suite runs; the extra ``test`` holds all that they need."""

Found = dict[tuple[str, str, str], Report]


def available(family: str) -> bool:
    """Whether the package that a family comes from is installed."""
    package = next((module for name, module in PACKAGES.items() if family.startswith(name)), None)
    return package is None or find_spec(package) is not None


def report_of(family: str, name: str, kind: str) -> Report:
    """Run every check on a model; a refusal is a report of its own."""
    factory = FAMILIES[family]()[name]
    started = time.process_time()
    try:
        report = examine(factory, PARTS if kind == "4" else chosen_cuts(built(factory)))
    except DnifxError as error:
        report = Report(failed={"refused": f"{type(error).__name__}: {error}"})
    report.seconds = time.process_time() - started
    return report


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Iterator[Found]:
    """Gather the reports of a session, and print a table by family when it ends."""
    gathered: Found = {}
    yield gathered
    if len(gathered) > len(FAST):
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            Console(width=120).print("", table(gathered))


def table(gathered: Found) -> Table:
    """Return how many models of each family hold each check."""
    shown = Table(title="real models, with each kind of cuts: checks held / asked")
    for heading in ("family", "models", *CHECKS, "all", "cpu s"):
        shown.add_column(heading, justify="left" if heading == "family" else "right")
    families: dict[str, list[Report]] = defaultdict(list)
    for (family, _, _), report in gathered.items():
        families[family].append(report)
    for family, reports in [*families.items(), ("all", list(gathered.values()))]:
        held = [
            f"{sum(name in each.passed for each in reports)}/{sum(name not in each.unasked for each in reports)}"
            for name in CHECKS
        ]
        whole = f"{sum(not each.failed for each in reports)}/{len(reports)}"
        shown.add_row(family, str(len(reports)), *held, whole, f"{sum(each.seconds for each in reports):.0f}")
    return shown


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let libraries that are not under test say nothing."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name", "kind"), FAST)
def test_models_of_the_default_suite_hold_every_check(family: str, name: str, kind: str) -> None:
    report = report_of(family, name, kind)
    assert not report.failed, "\n".join(f"{check}: {reason}" for check, reason in report.failed.items())
    assert "oracle" in report.passed


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name"), [(family, name) for family, make in FAMILIES.items() for name in make()])
def test_model(family: str, name: str, kind: str, found: Found) -> None:
    if not available(family):
        pytest.skip(f"{family} is not installed; pip install 'dnifx[models]'")
    report = found[family, name, kind] = report_of(family, name, kind)
    assert not report.failed, "\n".join(f"{check}: {text}" for check, text in report.failed.items())


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_family_holds_its_count(family: str, found: Found) -> None:
    if not available(family):
        pytest.skip(f"{family} is not installed; pip install 'dnifx[models]'")
    reports = [report for (of, _, _), report in found.items() if of == family]
    if len(reports) < len(KINDS) * len(FAMILIES[family]()):
        pytest.skip("only some of the family's models were run")
    assert sum(not report.failed for report in reports) >= HELD[family]


def test_the_sweep_is_as_wide_as_it_says() -> None:
    assert len(FAMILIES) >= 12
    assert len(FAST) >= 15
    assert not any(family.startswith(("torchvision", "timm")) for family, _, _ in FAST)
    assert sum(len(make()) for make in FAMILIES.values()) >= 120
    assert set(HELD) == set(FAMILIES)
    assert all(count <= len(KINDS) * len(FAMILIES[family]()) for family, count in HELD.items())
