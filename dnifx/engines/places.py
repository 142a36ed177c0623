"""Places in one process: a device and, where it has them, a stream."""

import re
from dataclasses import dataclass

import torch

from dnifx.errors import PlaceError

_PLACE = re.compile(r"(?P<device>[^/\s]+)(?:/(?P<stream>\d+))?")


@dataclass(frozen=True)
class Place:
    """Where partitions run in this process: a device, and a stream of it; None for the one that is current there."""

    device: torch.device
    stream: int | None = None

    def __str__(self) -> str:
        return f"{self.device}" + ("" if self.stream is None else f"/{self.stream}")

    @property
    def has_streams(self) -> bool:
        """Whether work is queued there, while the host goes on."""
        return self.device.type == "cuda"


def read_place(text: object) -> Place:
    """Return the place that a user names: ``cuda:0``, ``cuda:1/2``, ``torch.device("cuda", 1)``.

    Raises:
        PlaceError: It is none, or this machine has no such device.
    """
    found = _PLACE.fullmatch(str(text)) if isinstance(text, str | torch.device) else None
    try:
        device = None if found is None else torch.device(found["device"])
    except RuntimeError:
        device = None
    if found is None or device is None:
        raise PlaceError(
            f"{text!r} is no place; write a device, and a stream where it has several: 'cuda:0', 'cuda:1/2'"
        )
    stream = None if found["stream"] is None else int(found["stream"])
    if stream is not None and device.type != "cuda":
        raise PlaceError(f"{text!r} names a stream, and {device.type} has none. Leave it out: {found['device']!r}")
    refuse_missing(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return Place(device, stream)


def refuse_missing(device: torch.device) -> None:
    """Raise PlaceError where a device cannot be had."""
    why = ""
    if device.type == "meta":
        why = "tensors there hold no values"
    elif device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        why = f"this machine has {count} CUDA devices" if (device.index or 0) >= count else ""
    elif device.type != "cpu":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            why = str(error).splitlines()[0][:200]
    if why:
        raise PlaceError(f"{device} cannot be had: {why}. Give places that this machine has (dnifx doctor lists them)")


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one. A CPU is one, whatever its number."""
    return one == other or one.type == other.type == "cpu"
