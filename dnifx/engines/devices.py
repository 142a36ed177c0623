"""A run in one process over several devices, or over several streams of one: what is moved from place to place, and how.

Each transfer has a stream of its own, and events tell the streams of its two ends when they may go on. So the host waits for
nothing, and a place waits for what it takes alone. Where one end is a CPU there are no streams, and the host does the copying.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dnifx.engines.base import OneProcess
from dnifx.engines.held import tensors_of_boundaries, tensors_of_partitions
from dnifx.engines.places import Place, same_device
from dnifx.errors import PlaceError
from dnifx.ir import Program

Mail = tuple[tuple[Any, ...], torch.cuda.Event | None]
"""Values that were moved, and what the stream that takes them waits for."""


class Devices(OneProcess):
    """The engine of a run in one process over several places.

    Args:
        program: The program; its tensors are moved to the places of their partitions.
        places: The places.
        numbers: The number of each partition's place among them.
        lag: Steps that a target may be late.

    Attributes:
        whole: Whether all tensors are where they were before the run.
    """

    def __init__(self, program: Program, places: Sequence[Place], numbers: tuple[int, ...], lag: int) -> None:
        super().__init__()
        self.named, self.places, self.lag = tuple(places), numbers, lag
        self.producers = tuple(each.producer for each in program.boundaries)
        self.whole = True
        self._tensors: dict[int, tuple[Tensor, torch.device, torch.device]] = {}
        self._mail: dict[tuple[Any, ...], Mail] = {}
        self._streams: dict[Any, torch.cuda.Stream] = {}
        self._base: dict[torch.device, torch.cuda.Stream] = {}
        self._here, self._step = 0, 0
        self.settle(program)
        self.home = next((home for _, _, home in self._tensors.values()), torch.device("cpu"))

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied: streams are made anew, and what is under way has arrived."""
        self.wait()
        mail = {key: (values, None) for key, (values, _) in self._mail.items()}
        return {**self.__dict__, "_streams": {}, "_base": {}, "_mail": mail}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what was copied: tensors are known by other numbers now."""
        self.__dict__.update(state)
        self._tensors = {id(each[0]): each for each in self._tensors.values()}

    def settle(self, program: Program) -> None:
        """Take note of where the tensors of a program belong, and move them there.

        Raises:
            PlaceError: It has other partitions than there are places for, or reads a tensor in places on two devices.
        """
        if len(program.partitions) != len(self.places):
            raise PlaceError(
                f"for these inputs the model has {len(program.partitions)} partitions, and places were given for {len(self.places)}. "
                "Leave places= out, or give inputs of the kind of the example alone"
            )
        for partition, tensors in zip(program.partitions, tensors_of_partitions(program), strict=True):
            for name, each in tensors.items():
                self._settle(each, self.places[partition.index], name)
        for producer, each in tensors_of_boundaries(program):
            self._settle(each, self.places[producer], "a parameter of an estimator")
        self.spread()

    def _settle(self, tensor: Tensor, number: int, name: str) -> None:
        device = self.named[number].device
        known = self._tensors.setdefault(id(tensor), (tensor, device, tensor.device))
        if known[1] != device:
            raise PlaceError(f"{name!r} is read on {known[1]} and on {device}. Give these partitions one device")

    def spread(self) -> None:
        """Move every tensor to its place."""
        for tensor, device, _ in self._tensors.values():
            put(tensor, device)
        self.whole = False

    def gather(self) -> None:
        """Move every tensor back to where it was before the run, until the next step."""
        self.wait()
        for tensor, _, home in self._tensors.values():
            put(tensor, home)
        self.whole = True

    @contextmanager
    def gathered(self) -> Iterator[Callable[[Any], Any]]:
        """Run something on the whole model, on the device where it was; gives what brings values there."""
        before = self.whole
        self.gather()
        try:
            yield partial(pytree.tree_map_only, Tensor, lambda each: each.to(self.home))
        finally:
            if not before:
                self.spread()

    @contextmanager
    def running(self, step: int, evaluates: bool = False) -> Iterator[None]:
        """Run a step: its work begins after what is queued on the current streams, and work that follows it comes after."""
        if self.whole:
            self.spread()
        self._step = step
        for key in [key for key in self._mail if key[-1] < step - self.lag]:
            del self._mail[key]
        own = [each for each in self.named if each.stream is not None]
        devices = {each.device for each in self.named if each.has_streams}
        self._base = {each: torch.cuda.current_stream(each) for each in devices}
        current = torch.cuda.current_device() if devices else 0
        for each in own:
            self.stream(each).wait_stream(self._base[each.device])
        try:
            yield
        finally:
            for each in own:
                self._base[each.device].wait_stream(self.stream(each))
            for stream in self._base.values():
                torch.cuda.set_stream(stream)
            if devices:
                torch.cuda.set_device(current)
            self._base = {}

    def enter(self, number: int) -> None:
        """Go on in a place: what follows is queued there."""
        self._here, place = number, self.named[number]
        if place.has_streams:
            torch.cuda.set_stream(self.stream(place))  # and its device

    def stream(self, place: Place) -> torch.cuda.Stream:
        """Return the stream of a place."""
        if place.stream is None:
            return self._base.get(place.device) or torch.cuda.current_stream(place.device)
        return self._own_stream(place, place.device)

    def _own_stream(self, key: Any, device: torch.device) -> torch.cuda.Stream:
        if key not in self._streams:
            self._streams[key] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[key]

    def taken(self, *values: Any) -> tuple[Any, ...]:
        """Return inputs, targets or features in the present place, wherever they are."""
        here = self.named[self._here]

        def brought(value: Tensor) -> Tensor:
            (made,) = self.arrived(self.moved(Place(value.device), here, (value,)))
            return made if isinstance(made, Tensor) else value

        return tuple(pytree.tree_map_only(Tensor, brought, value) for value in values)

    def send_values(self, partition: int, target: int, *values: Any) -> None:
        """Move what a partition made, to another place."""
        self._mail["values", partition, target, self._step] = self.sent(target, values)

    def receive_values(self, partition: int, source: int) -> tuple[Any, ...]:
        """Take what a partition of another place made in this step."""
        return self.arrived(self._mail.pop(("values", partition, self._here, self._step)))

    def send_target(self, boundary: int, target: int, *gradients: Tensor | None) -> None:
        """Move the gradients that this place gives to the values of a boundary; None where it used one not at all."""
        self._mail["target", boundary, self._here, self._step] = self.sent(target, gradients)

    def receive_target(self, boundary: int, peer: int, lag: int = 0) -> tuple[Any, ...]:
        """Take the gradients that another place gave to a boundary's values ``lag`` steps ago."""
        self.enter(self.places[self.producers[boundary]])
        return self.arrived(self._mail.pop(("target", boundary, peer, self._step - lag)))

    def sent(self, target: int, values: tuple[Any, ...]) -> Mail:
        """Move values from the present place to another."""
        return self.moved(self.named[self._here], self.named[target], values)

    def moved(self, start: Place, end: Place, values: tuple[Any, ...]) -> Mail:
        """Move values from place to place, each tensor once; return them, with what says when they have arrived."""
        if not end.has_streams:
            return relocated(values, start, end), None
        if start.device == end.device:
            return values, self.stream(start).record_event() if start.stream != end.stream else None
        arriving = self._own_stream((start, end, "in"), end.device)
        if not start.has_streams:
            with torch.cuda.stream(arriving):
                return relocated(values, start, end), arriving.record_event()
        leaving = self._own_stream((start, end, "out"), start.device)
        leaving.wait_stream(self.stream(start))
        with torch.cuda.stream(leaving), torch.cuda.stream(arriving):
            made = relocated(values, start, end)
            for each in tensors_in(values):
                each.record_stream(leaving)  # its memory is free once it was read
        return made, arriving.record_event()

    def arrived(self, mail: Mail) -> tuple[Any, ...]:
        """Return values that were moved; the present place's work that follows waits until they are there."""
        values, event = mail
        if event is not None:
            stream = self.stream(self.named[self._here])
            stream.wait_event(event)
            for each in tensors_in(values):
                each.record_stream(stream)
        return values

    def wait(self) -> None:
        """Wait on the host until all places have done what they were given."""
        for device in {each.device for each in self.named if each.has_streams}:
            torch.cuda.synchronize(device)

    def device_of(self, partition: int) -> torch.device:
        """Return where a partition is."""
        found: torch.device = self.named[self.places[partition]].device
        return found

    def restart(self, lag: int) -> None:
        """Forget what is under way: the run goes on from a saved state, with its lag."""
        self._mail, self.lag = {}, max(self.lag, lag)


def carried(value: Tensor, place: Place) -> Tensor:
    """Return a tensor on the device of a place, without waiting for it unless the host is to read it."""
    return value.to(place.device, non_blocking=place.has_streams)


def relocated(values: tuple[Any, ...], start: Place, end: Place) -> tuple[Any, ...]:
    """Return values on another device. The device itself, where a partition hands it on, becomes the other one too.

    Tensors that are not on the first device, such as sizes on the host, stay where they are.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return carried(value, end) if same_device(value.device, start.device) else value
        return end.device if value == start.device and isinstance(value, torch.device) else value

    return tuple(pytree.tree_map(moved, value) for value in values)


def tensors_in(values: Any) -> Iterable[Tensor]:
    """Return the tensors on CUDA devices among values."""
    return (each for each in pytree.tree_leaves(values) if isinstance(each, Tensor) and each.is_cuda)


def put(tensor: Tensor, device: torch.device) -> None:
    """Move a tensor itself to a device; whoever holds it sees it there."""
    if not same_device(tensor.device, device):
        with torch.no_grad():
            tensor.data = tensor.data.to(device)
