"""What this machine can run: devices, distributed backends, threads and memory."""

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import RenderableType
from rich.table import Table

from dnifx.units import byte_size, plural


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: As ``torch.device`` takes it.
        model: What it is.
        memory: Its bytes of memory; 0 where they are not known.
    """

    name: str
    model: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """What this machine can run.

    Attributes:
        devices: The CPU, then the accelerators that torch sees.
        backends: The backends of ``torch.distributed`` that this torch has.
        cores: Cores that this process may use.
        threads: Threads that torch uses for one operation.
        memory: Bytes of main memory that are free; 0 where they are not known.
        torch: Version of torch.
        python: Version of Python.
    """

    devices: tuple[Device, ...]
    backends: tuple[str, ...]
    cores: int
    threads: int
    memory: int
    torch: str
    python: str

    @property
    def runs(self) -> str:
        """Say in a sentence or two how a net can be trained here."""
        gpus = len(self.devices) - 1
        here = "Training runs in one process, on the CPU" + (f" or on one of {plural(gpus, 'GPU')}." if gpus else ".")
        if "gloo" not in self.backends:
            return f"{here} Ranks do not run here: this torch has no gloo."
        if self.cores == 1:
            return f"{here} Ranks run here too, on gloo, but they would share one core."
        return f"{here} Ranks run here too, on gloo and the CPU: up to {self.cores} have a core of their own."

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {**asdict(self), "runs": self.runs}

    def __rich__(self) -> RenderableType:
        shown = Table(box=None, show_header=False, pad_edge=False, title="This machine", title_justify="left")
        shown.add_column(style="bold cyan", no_wrap=True)
        shown.add_column()
        for device in self.devices:
            memory = f", {byte_size(device.memory)}" if device.memory else ""
            shown.add_row(device.name, f"{device.model}{memory}")
        shown.add_row("free memory", byte_size(self.memory) if self.memory else "not known")
        shown.add_row("cores", f"{self.cores}; torch uses {plural(self.threads, 'thread')} for one operation")
        shown.add_row("backends", ", ".join(self.backends) or "none: this torch has no torch.distributed")
        shown.add_row("versions", f"torch {self.torch}, Python {self.python}")
        shown.add_row("", self.runs)
        return shown


def this_machine() -> Machine:
    """Look at this machine."""
    cpu = Device("cpu", platform.processor() or platform.machine(), _pages("SC_PHYS_PAGES"))
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [name for name in ("gloo", "nccl", "mpi", "ucc") if dist.is_available() and dist.is_backend_available(name)]
    return Machine(
        devices=(cpu, *(Device(f"cuda:{k}", each.name, each.total_memory) for k, each in enumerate(gpus))),
        backends=tuple(found),
        cores=cores,
        threads=torch.get_num_threads(),
        memory=_pages("SC_AVPHYS_PAGES"),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def _pages(name: str) -> int:
    """Bytes of memory that the operating system tells under a name; 0 where it tells none."""
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
