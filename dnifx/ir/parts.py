"""Parts: what fires together where a net has several rates, and the messages between them."""

from dataclasses import dataclass

from torch.utils import _pytree as pytree

from dnifx.ir.cuts import Boundary


@dataclass(frozen=True)
class Take:
    """A tensor that a part takes from outside.

    Attributes:
        name: Its name in the part's graph.
        source: Index of the part that makes it; None for an input of the model.
        place: Its place among the values that part gives, or among the model's flat inputs.
    """

    name: str
    source: int | None
    place: int


@dataclass(frozen=True)
class PartState:
    """A state that one part carries from firing to firing.

    Attributes:
        key: The part's name for it.
        cut: Index of its cut in time among the model's.
        spec: Its structure.
        count: Number of its tensors.
    """

    key: str
    cut: int
    spec: pytree.TreeSpec
    count: int


@dataclass(frozen=True)
class Part:
    """What fires together. A net without rates has one part, which fires in every window.

    Attributes:
        index: Its number; the part that fires most often is the first.
        every: Windows from one firing to the next.
        partitions: Its partitions, by their numbers in the net.
        boundaries: The boundaries inside it, by their numbers in the net.
        takes: What it takes, in the order of its graph's inputs; its states follow.
        states: Its states.
        results: What it computes of the model's output, by place among the flat outputs.
        gives: How many values it gives to slower parts. Its graph returns results, given values, next states.
    """

    index: int = 0
    every: int = 1
    partitions: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()
    takes: tuple[Take, ...] = ()
    states: tuple[PartState, ...] = ()
    results: tuple[int, ...] = ()
    gives: int = 0


@dataclass(frozen=True)
class Message:
    """What one part gives to another that fires less often; the program has the interface of its boundary.

    Attributes:
        boundary: Its boundary; the specs are those that the estimator sees, batch first.
        source: Index of the part that gives.
        target: Index of the part that takes.
        places: Places of the values among what the source gives.
        inputs: Places of the values among what the target takes.
        scale: What synthetic gradients are multiplied by.
    """

    boundary: Boundary
    source: int
    target: int
    places: tuple[int, ...]
    inputs: tuple[int, ...]
    scale: float
