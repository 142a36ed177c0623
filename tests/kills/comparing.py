"""Compares the output folders of two runs bit for bit, but for the time that they took and the folder's own name."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

APART = {"seconds", "command", "out"}
"""What may differ: how long the steps took, and the name of the folder."""


PREVIOUS = ".previous"
"""The ending of the generation of a checkpoint before the last. A stop that is saved may leave it at another step."""


def differences(found: Path, expected: Path, previous: bool = True) -> Iterator[str]:
    """Tell in words what differs between two output folders; what the checkpoints before the last hold, if ``previous``."""
    ours, theirs = files(found), files(expected)
    for name in sorted(ours - theirs):
        yield f"{name} is left behind"
    for name in sorted(theirs - ours):
        yield f"{name} is missing"
    for name in sorted(each for each in ours & theirs if previous or not each.endswith(PREVIOUS)):
        yield from different(content(found / name), content(expected / name), name)


def files(folder: Path) -> set[str]:
    """Return the names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def content(path: Path) -> Any:
    """Return what a file holds: a tree for results and checkpoints, bytes for pictures and for what is damaged."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix in (".pt", PREVIOUS):
            return torch.load(path, weights_only=True)
    except (RuntimeError, ValueError):
        pass
    return path.read_bytes()


def different(found: Any, expected: Any, where: str) -> Iterator[str]:
    """Tell in words what differs between two trees."""
    if isinstance(found, bytes):
        if found != expected:
            yield f"{where}: other bytes"
    elif type(found) is not type(expected):
        yield f"{where}: {found!r} instead of {expected!r}"
    elif isinstance(found, Mapping):
        if list(found) != list(expected):
            yield f"{where}: {list(found)} instead of {list(expected)}"
        for key in found.keys() & expected.keys() - APART:
            yield from different(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, (list, tuple)):
        if len(found) != len(expected):
            yield f"{where}: {len(found)} values instead of {len(expected)}"
        for place, pair in enumerate(zip(found, expected, strict=False)):
            yield from different(*pair, f"{where}/{place}")
    elif isinstance(found, Tensor):
        if found.dtype != expected.dtype or found.numpy().tobytes() != expected.numpy().tobytes():
            yield f"{where}: {found} instead of {expected}"
    elif repr(found) != repr(expected):
        yield f"{where}: {found!r} instead of {expected!r}"
