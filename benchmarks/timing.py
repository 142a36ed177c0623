"""Timing by ratios: contestants take turns in one process."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Steps per second of each contestant, one number a round."""

    rates: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Return a contestant's median rate in steps per second."""
        return statistics.median(self.rates[name])

    def ratio(self, name: str, to: str) -> float:
        """Return the ratio of one contestant's rate to another's, the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.rates[name], self.rates[to], strict=True))


def race(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, steps: int, synchronise: Callable[[], None]
) -> Timing:
    """Time contestants in turn.

    The order alternates, so that a drift of the machine affects all contestants alike.

    Args:
        contestants: For each contestant, a function that runs one step.
        rounds: Number of turns of each contestant.
        steps: Steps in a turn.
        synchronise: Waits for the device.
    """
    for step in contestants.values():
        for _ in range(max(3, steps // 4)):
            step()
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            synchronise()
            started = time.perf_counter()
            for _ in range(steps):
                contestants[name]()
            synchronise()
            rates[name].append(steps / (time.perf_counter() - started))
    return Timing({name: tuple(found) for name, found in rates.items()})


def waiter(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until a device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else (lambda: None)


def machine(device: torch.device) -> dict[str, str]:
    """Describe the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def as_json(title: str, device: torch.device, figures: Mapping[str, Any]) -> str:
    """Return the figures as JSON, with the machine that they come from."""
    return json.dumps({"benchmark": title, **machine(device), "figures": dict(figures)}, indent=2)
