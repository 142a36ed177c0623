"""The machine that an experiment runs on: its device, torch's settings, and the versions."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from dnifx.errors import OptionError


def find_device(name: str) -> torch.device:
    """Return the device that ``--device`` names.

    Raises:
        OptionError: The name is unknown, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device: got {name!r}, expected cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device: got {name!r}, but torch sees {torch.cuda.device_count()} GPUs; give --device cpu")
    return device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture and torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> Mapping[str, str]:
    """Return the versions of dnifx, torch, Python and the system."""
    try:
        own = version("dnifx")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "dnifx": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


@contextmanager
def torch_settings(threads: int, matmul: str | None = None) -> Iterator[None]:
    """Set torch's threads and precision of matrix products, and restore both at the end.

    Args:
        threads: Number of CPU threads; 0 keeps the present number.
        matmul: The precision, as ``torch.set_float32_matmul_precision`` takes it; None keeps it.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or before[0])
    torch.set_float32_matmul_precision(matmul or before[1])
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
