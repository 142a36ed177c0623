"""Settings of all tests: one thread, the same examples each time, reasons for skips, a place for emitted packages."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.engines.pool import Pool, started

SLOW_CHECKS = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, max_examples=30, suppress_health_check=SLOW_CHECKS
)
settings.register_profile("night", deadline=None, max_examples=3000, print_blob=True, suppress_health_check=SLOW_CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.accelerator.is_available():
    # For each kind of device that is not there, torch.manual_seed formats a traceback and keeps it: seed what is there.
    setattr(torch, "manual_seed", torch.default_generator.manual_seed)  # noqa: B010 - a function, to type checkers

COMMANDS = {
    "slow": "a long run, by a command of its own: pytest -m slow",
    "browser": "the page in headless Chromium, by a command of its own: pytest -m browser",
    "models": "the sweep over real models, by a command of its own: pytest -m models",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this command does not run."""
    chosen = str(config.option.markexpr)
    reasons = {marker: reason for marker, reason in COMMANDS.items() if marker not in chosen}
    if not torch.cuda.is_available():
        reasons["cuda"] = "torch finds no CUDA device on this machine"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes that run jobs over ranks, started once for all tests."""
    with started(4) as made:
        yield made


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Path]:
    """A place for packages called ``emitted_...``, importable and forgotten afterwards."""
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("emitted_")]:
        del sys.modules[name]
