"""Place partitions on several devices of one process, or on several streams of one device."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnifx.engines.held import tensors_of_boundaries, tensors_of_partitions
from dnifx.engines.places import Place, read_place
from dnifx.errors import PlaceError, nearest
from dnifx.estimators.suffix import SuffixGradient
from dnifx.ir import Program
from dnifx.passes.place import (
    Conflict,
    balanced,
    conflicts,
    copied_by_suffixes,
    refuse_everywhere,
    shared_parameters,
)

Placed = tuple[tuple[Place, ...], tuple[int, ...]]
"""The places, and the number of each partition's place among them."""


def names_devices(places: object) -> bool:
    """Whether ``places=`` names devices, and not ranks."""
    if isinstance(places, Mapping):
        places = list(places.values())
    if isinstance(places, str):
        places = [] if places == "ranks" else places.split(",")
    return isinstance(places, Sequence) and any(
        isinstance(each, torch.device) or (isinstance(each, str) and not each.strip().isdecimal()) for each in places
    )


def placed_devices(places: Any, program: Program) -> Placed:
    """Return the place of each partition.

    Args:
        places: Places to balance the partitions over, a place for each partition, in order, or one by name.
        program: The program, with its interfaces.

    Raises:
        PlaceError: A place cannot be had, a partition has none or several, or partitions cannot run in different places.
    """
    refuse_everywhere(program, "over several devices")
    names = [each.name for each in program.partitions]
    if isinstance(places, Mapping):
        wrong = sorted({*map(str, places)} ^ {*names})
        if wrong:
            raise PlaceError(
                f"places= names {nearest('', wrong, 3)} wrongly or not at all; give a place for each of {nearest('', names, 9)}"
            )
        words: list[object] = [places[name] for name in names]
    else:
        words = [*places.split(",")] if isinstance(places, str) else list(places)
    given = [read_place(word.strip() if isinstance(word, str) else word) for word in words]
    named = tuple(dict.fromkeys(given))
    if len(given) == len(names):
        numbers = tuple(map(named.index, given))
    elif len(named) == len(given):
        apart = [
            *shared_parameters(program),
            *copied_by_suffixes(program),
            *(() if one_device(named) else shared_tensors(program)),
        ]
        numbers = balanced(program, len(named), apart=apart, word="places")
    else:
        raise PlaceError(
            f"{len(given)} places were given for {len(names)} partitions ({nearest('', names, 9)}). Give each partition one, or name each "
            "place once, and the partitions are balanced over them"
        )
    refuse_apart(program, named, numbers)
    return named, numbers


def one_device(places: Iterable[Place]) -> bool:
    """Whether places are streams of one device."""
    return len({each.device for each in places}) == 1


def refuse_apart(program: Program, named: Sequence[Place], numbers: Sequence[int]) -> None:
    """Raise PlaceError where partitions cannot run in the places that they were given."""
    for_places = [*conflicts(program), *shared_parameters(program), *copied_by_suffixes(program)]
    found = [(each, False) for each in for_places] + [(each, True) for each in shared_tensors(program)]
    for (first, second, reason), by_device in found:
        one, other = named[numbers[first]], named[numbers[second]]
        if one != other and not (by_device and one.device == other.device):
            names = program.partitions[first].name, program.partitions[second].name
            reason = reason.replace("the last rank", "the place of the last partition")
            raise PlaceError(
                f"{reason}: {names[0]} and {names[1]} cannot run on {one} and {other}. Give both one {'device' if by_device else 'place'}"
            )


def shared_tensors(program: Program) -> Iterator[Conflict]:
    """Partitions that read the same tensor, which is on one device: buffers, frozen parameters, estimators of two boundaries."""
    users: dict[int, tuple[str, list[int]]] = {}
    for index, tensors in enumerate(tensors_of_partitions(program)):
        for name, each in tensors.items():
            users.setdefault(id(each), (f"they read {name!r}", []))[1].append(index)
    for producer, each in tensors_of_boundaries(program):
        users.setdefault(id(each), ("their estimators share a tensor", []))[1].append(producer)
    last = len(program.partitions) - 1
    for boundary, interface in zip(program.boundaries, program.interfaces, strict=True):
        suffix = interface.estimator
        if isinstance(suffix, SuffixGradient) and any(True for _ in tensors_of(suffix.loss)):
            name = f"the suffix on {boundary.name!r} computes the loss, which holds tensors, as the last partition does"
            yield boundary.producer, last, name
    for reason, homes in users.values():
        for second in sorted(set(homes))[1:]:
            yield min(homes), second, reason


def tensors_of(loss: object) -> Iterator[Tensor]:
    """Return the tensors that a loss holds, such as weights of classes."""
    if isinstance(loss, nn.Module):
        yield from (*loss.parameters(), *loss.buffers())
